"""Work queue of problems: each rank takes the next batch of problem numbers from a shared counter.

The longest problems come first; a rank takes a batch when it has a free slot. Each problem is taken exactly once, also
with slow or failed ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainer.runtime import distributed
from trainer.runtime.shared_counter import SharedCounter

COUNTER_NAMES = ("next_batch", "solved", "correct")
_EXHAUSTED = 1 << 40
_MAX_BATCH = 8


def take_problems(counter: SharedCounter, order: Sequence[int], size: int = 1) -> Iterator[int]:
    """Yield the problems of this rank, taken from `order` in batches of `size`, until all are taken."""
    while True:
        start = counter.add("next_batch", 1) * size
        batch = order[start : start + size]
        if not batch:
            return
        yield from batch


def exhaust_queue(counter: SharedCounter) -> None:
    """Give no rank another batch; called when a rank has failed."""
    counter.add("next_batch", _EXHAUSTED)


def chunk_size(num_problems: int, num_slots: int) -> int:
    """Return the batch size for about eight batches per slot of all ranks, so that the ranks end at similar times."""
    return max(1, min(_MAX_BATCH, num_problems // (8 * num_slots * distributed.environment().world_size)))
