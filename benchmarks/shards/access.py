"""Open a million examples and read some at random: access.py ours|arrow PATH READS. Libraries are loaded before."""

from __future__ import annotations

import hashlib
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


def ours(path: str) -> Any:
    from trainer.shards.methods import method
    from trainer.shards.read import Shards

    view = method("cot")

    def opened() -> Any:
        shards = Shards.open(path)
        return len(shards), lambda index: shards.example(index, view)

    return opened


def arrow(path: str) -> Any:
    """numpy is the quickest format that `datasets` has."""
    import datasets

    def opened() -> Any:
        found = datasets.load_from_disk(path).with_format("numpy")

        def example(index: int) -> tuple[np.ndarray, np.ndarray]:
            row = found[index]
            return row["input_ids"], row["learned"]

        return len(found), example

    return opened


def main() -> None:
    name, path, reads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    opened = {"ours": ours, "arrow": arrow}[name](path)
    took = []
    for _ in range(OPENINGS):
        start = time.perf_counter()
        count, example = opened()
        took.append(time.perf_counter() - start)
    indices = np.random.default_rng(0).integers(0, count, reads).tolist()
    for index in indices[:100]:  # what is only slow the first time
        example(index)
    start = time.perf_counter()
    for index in indices:
        example(index)
    seconds = time.perf_counter() - start
    proof = hashlib.sha256()
    for index in indices[:1000]:
        tokens, learned = example(index)
        proof.update(np.asarray(tokens, np.int64).tobytes() + np.asarray(learned, bool).tobytes())
    print(
        json.dumps(
            {
                "open_ms": 1000 * statistics.median(took),
                "reads_per_second": reads / seconds,
                "examples": count,
                "digest": proof.hexdigest(),
            }
        )
    )


if __name__ == "__main__":
    main()
