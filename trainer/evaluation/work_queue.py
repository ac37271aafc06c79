"""Problems as a work queue: each rank takes the next batch of problem numbers from a shared counter.

The longest problems come first, a few per batch; a rank takes a batch when it has a free slot. Uneven lengths, slow
ranks and dead ranks cost time, and every problem is still taken exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.runtime import distributed
from trainer.runtime.shared_counter import Counter

CELLS = ("next_batch", "solved", "correct")
_EXHAUSTED = 1 << 40
_MAX_BATCH = 8


class WorkQueue:
    """The problems of `order` in tickets of `size`, drawn one problem at a time."""

    def __init__(self, counter: Counter, order: Sequence[int], size: int = 1) -> None:
        self._counter = counter
        self._order = order
        self._size = size
        self._held: list[int] = []
        self._is_exhausted = False

    def next_index(self) -> int | None:
        """The next problem for this rank, None when all are taken."""
        if not self._held and not self._is_exhausted:
            start = self._counter.add("next_batch", 1) * self._size
            self._held = list(self._order[start : start + self._size])
            self._is_exhausted = not self._held
        return self._held.pop(0) if self._held else None


def exhaust_queue(counter: Counter) -> None:
    """Nobody gets another ticket: a rank that failed saves the others the work."""
    counter.add("next_batch", _EXHAUSTED)


def batch_size(num_problems: int, num_slots: int) -> int:
    """About eight tickets for each slot of all ranks, so that the last ones to be drawn are small."""
    return max(1, min(_MAX_BATCH, num_problems // (8 * num_slots * distributed.environment().world_size)))
