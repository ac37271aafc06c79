"""Reader of data sets on the Hugging Face Hub.

For the preparation step: one process, with internet or a filled cache. Training and evaluation read shards, so ranks do
not race for the cache of `datasets` (its issues 4661, 5412), and compute nodes need no network.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from trainer.errors import UserError
from trainer.problems.problem import MAX_REJECTED_TEXT
from trainer.problems.records import JsonRecord


def read_hub(
    name: str, configuration: str | None, split: str | None, revision: str | None
) -> Iterator[JsonRecord]:
    """Yield every row of one split, or of all splits in order if `split` is None. Downloads before the first row.

    Raises UserError with the message of `datasets`: unknown data set, configuration or split, no network, broken cache.
    """
    from datasets import DatasetDict, load_dataset

    try:
        loaded = load_dataset(name, configuration, split=split, revision=revision)
        splits = list(loaded.values()) if isinstance(loaded, DatasetDict) else [loaded]
    except Exception as error:  # a dozen unrelated classes of four packages
        raise UserError(
            f"cannot load {name} (configuration {configuration}, split {split}, revision {revision}) as a hub "
            f"data set: {type(error).__name__}: {str(error).strip()}\n"
            "A local file or folder of that name would have been read instead. Without internet, run this once "
            "on a machine that has it (same HF_HOME, then set HF_HUB_OFFLINE=1), or give a path to the files."
        ) from error
    return _rows(splits)


def _rows(splits: list[Any]) -> Iterator[JsonRecord]:
    for position, row in enumerate(itertools.chain.from_iterable(splits)):
        yield JsonRecord(position + 1, position, row, raw=repr(row)[:MAX_REJECTED_TEXT])
