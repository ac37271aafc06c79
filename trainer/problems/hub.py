"""Rows of a data set on the Hugging Face hub, as the records that a local file would give.

Meant for the preparation step: one process, with internet or a filled cache. Training and evaluation read
shards, so no rank ever races another for the cache of `datasets` (its issues 4661, 5412), and no compute node
needs a network.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.errors import UserError
from trainer.problems.problem import MAX_REJECTED_TEXT
from trainer.problems.records import JsonRecord


def read_hub(
    name: str, configuration: str | None, split: str | None, revision: str | None
) -> Iterator[JsonRecord]:
    """Yield every row; `split` None: of all splits, one after the other. Downloads before the first row.

    Raises UserError with what `datasets` said: no such data set, configuration or split, no network, a broken
    cache.
    """
    from datasets import DatasetDict, load_dataset

    try:
        loaded = load_dataset(name, configuration, split=split, revision=revision)
        parts = list(loaded.values()) if isinstance(loaded, DatasetDict) else [loaded]
    except Exception as error:  # a dozen unrelated classes of four packages; all are about this one name
        raise UserError(
            f"cannot load {name} (configuration {configuration}, split {split}, revision {revision}) as a hub "
            f"data set: {type(error).__name__}: {str(error).strip()}\n"
            "A local file or folder of that name would have been read instead. Without internet, run this once "
            "on a machine that has it (same HF_HOME, then set HF_HUB_OFFLINE=1), or give a path to the files."
        ) from error
    return _rows(parts)


def _rows(parts: list[Any]) -> Iterator[JsonRecord]:
    position = 0
    for part in parts:
        for row in part:
            yield JsonRecord(position + 1, position, row, raw=repr(row)[:MAX_REJECTED_TEXT])
            position += 1
