"""Open a million examples and read some at random: access.py ours|arrow PATH READS. Libraries are loaded before.

A read is a batch of as many examples as a pack of 1024 tokens holds; both sides have a call for that.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

OPENINGS = 5
AT_ONCE = 6


def ours(path: str) -> Any:
    from trainer.shards.methods import view_of
    from trainer.shards.read import Shards

    view = view_of("cot")

    def opened() -> Any:
        shards = Shards.open(path)
        return len(shards), lambda indices: shards.examples(indices, view)

    return opened


def arrow(path: str) -> Any:
    """numpy is the quickest format that `datasets` has."""
    import datasets

    def opened() -> Any:
        found = datasets.load_from_disk(path).with_format("numpy")

        def examples(indices: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
            rows = found[indices]
            return list(zip(rows["input_ids"], rows["learned"], strict=True))

        return len(found), examples

    return opened


def main() -> None:
    name, path, reads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    opened = {"ours": ours, "arrow": arrow}[name](path)
    took = []
    for _ in range(OPENINGS):
        start = time.perf_counter()
        count, examples = opened()
        took.append(time.perf_counter() - start)
    packs = np.random.default_rng(0).integers(0, count, (reads // AT_ONCE, AT_ONCE)).tolist()
    for pack in packs[:10]:  # what is only slow the first time
        examples(pack)
    start = time.perf_counter()
    for pack in packs:
        examples(pack)
    seconds = time.perf_counter() - start
    proof = hashlib.sha256()
    for tokens, learned in itertools.chain.from_iterable(map(examples, packs[:100])):
        proof.update(np.asarray(tokens, np.int64).tobytes() + np.asarray(learned, bool).tobytes())
    print(
        json.dumps(
            {
                "open_ms": 1000 * statistics.median(took),
                "reads_per_second": len(packs) * AT_ONCE / seconds,
                "examples": count,
                "digest": proof.hexdigest(),
            }
        )
    )


if __name__ == "__main__":
    main()
