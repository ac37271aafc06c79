"""Work queue of problems: each rank takes the next batch of problem numbers from a shared counter.

The longest problems come first; a rank takes a batch when it has a free slot. Each problem is taken exactly once, also
with slow or failed ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.runtime import distributed
from trainer.runtime.shared_counter import Counter

COUNTER_NAMES = ("next_batch", "solved", "correct")
_EXHAUSTED = 1 << 40
_MAX_BATCH = 8


class WorkQueue:
    """The problems of `order`, taken in batches of `size` and returned one at a time."""

    def __init__(self, counter: Counter, order: Sequence[int], size: int = 1) -> None:
        self._counter = counter
        self._order = order
        self._size = size
        self._batch: list[int] = []
        self._is_exhausted = False

    def next_index(self) -> int | None:
        """Return the next problem of this rank, None when all are taken."""
        if not self._batch and not self._is_exhausted:
            start = self._counter.add("next_batch", 1) * self._size
            self._batch = list(self._order[start : start + self._size])
            self._is_exhausted = not self._batch
        return self._batch.pop(0) if self._batch else None


def exhaust_queue(counter: Counter) -> None:
    """Give no rank another batch; called when a rank has failed."""
    counter.add("next_batch", _EXHAUSTED)


def batch_size(num_problems: int, num_slots: int) -> int:
    """Return the batch size for about eight batches per slot of all ranks, so that the ranks end at similar times."""
    return max(1, min(_MAX_BATCH, num_problems // (8 * num_slots * distributed.environment().world_size)))
