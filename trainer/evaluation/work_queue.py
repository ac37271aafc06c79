"""Work queue of problems: each rank takes the next chunk of problem numbers from a shared counter.

The longest problems come first; a rank takes a chunk when it has a free slot. Each problem is taken exactly once, also
with slow or failed ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainer.runtime import distributed
from trainer.runtime.shared_counter import SharedCounter

COUNTER_NAMES = ("next_chunk", "solved", "correct")
_EXHAUSTED = 1 << 40
_MAX_CHUNK = 8


def take_problems(counter: SharedCounter, order: Sequence[int], size: int = 1) -> Iterator[int]:
    """Yield the problems of this rank, taken from `order` in chunks of `size`, until all are taken."""
    while True:
        start = counter.add("next_chunk", 1) * size
        chunk = order[start : start + size]
        if not chunk:
            return
        yield from chunk


def exhaust_queue(counter: SharedCounter) -> None:
    """Give no rank another chunk; called when a rank has failed."""
    counter.add("next_chunk", _EXHAUSTED)


def chunk_size(num_problems: int, num_slots: int) -> int:
    """Return the chunk size for about eight chunks per slot of all ranks, so that the ranks end at similar times."""
    return max(1, min(_MAX_CHUNK, num_problems // (8 * num_slots * distributed.environment().world_size)))
