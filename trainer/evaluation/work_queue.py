"""Who takes what next: a counter all ranks share, and tickets drawn from it.

A ticket is a few problems, the longest first, so that the long ones do not come last; a rank draws when it has a
free slot. Uneven lengths, slow ranks and dead ranks cost time, and every problem is still taken exactly once.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

from trainer.runtime import distributed
from trainer.runtime.distributed import DistributedEnvironment

CELLS = ("next_ticket", "solved", "correct")
_EXHAUSTED = 1 << 40
_MAX_BATCH = 8


class Counter(Protocol):
    """Named integers shared by all ranks, from 0."""

    def add(self, cell: str, amount: int) -> int:
        """Add at once for all ranks; the value before."""

    def serve(self) -> None:
        """Called often: lets through what other ranks ask of this one."""

    def finish(self) -> None:
        """Collective: no rank adds any more."""


class ProcessCounter:
    """For one process."""

    def __init__(self) -> None:
        self._values = dict.fromkeys(CELLS, 0)

    def add(self, cell: str, amount: int) -> int:
        before = self._values[cell]
        self._values[cell] += amount
        return before

    def serve(self) -> None:
        pass

    def finish(self) -> None:
        pass


class StoreCounter:
    """On a TCP store that rank 0 serves from a thread of its own. Collective."""

    def __init__(self, world: DistributedEnvironment) -> None:
        from torch.distributed import TCPStore

        # MASTER_ADDR reaches rank 0 from everywhere; the port is any free one, and the process group tells it.
        host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=60)
        if world.rank == 0:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        port = distributed.broadcast_object(self._store.port if world.rank == 0 else None)
        if world.rank != 0:
            self._store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)

    def add(self, cell: str, amount: int) -> int:
        return self._store.add(cell, amount) - amount

    def serve(self) -> None:
        pass  # a thread of the store does

    def finish(self) -> None:
        distributed.barrier()  # rank 0 serves until the last has asked


class MPICounter:
    """In a window of rank 0's memory, by one-sided MPI operations. Collective.

    A passive target on another host makes progress only inside MPI calls: rank 0 calls `serve` at every step, and
    `finish` comes before any wait that is not MPI's, or whoever still asks would wait for rank 0, and rank 0 for him.
    """

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi: Any = MPI
        communicator = MPI.COMM_WORLD
        size = 8 * len(CELLS) if communicator.Get_rank() == 0 else 0
        self._window = MPI.Win.Allocate(size, 8, comm=communicator)
        if size:
            self._window.tomemory()[:] = bytes(size)
        communicator.Barrier()
        self._window.Lock_all()

    def add(self, cell: str, amount: int) -> int:
        change, before = array("q", [amount]), array("q", [0])
        self._window.Fetch_and_op(
            [change, self._mpi.INT64_T], [before, self._mpi.INT64_T], 0, CELLS.index(cell)
        )
        self._window.Flush(0)
        return before[0]

    def serve(self) -> None:
        self._mpi.COMM_WORLD.Iprobe()

    def finish(self) -> None:
        self._mpi.COMM_WORLD.Barrier()
        self._window.Unlock_all()
        self._window.Free()


@contextlib.contextmanager
def shared_counter() -> Iterator[Counter]:
    """The counter for the way this world was launched. Collective at both ends; the block must not raise on one
    rank alone (see `gather.errors_together`)."""
    world = distributed.environment()
    counter: Counter
    if world.world_size == 1:
        counter = ProcessCounter()
    elif world.launcher == "mpi":
        counter = MPICounter()
    else:
        counter = StoreCounter(world)
    yield counter
    counter.finish()


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
            start = self._counter.add("next_ticket", 1) * self._size
            self._held = list(self._order[start : start + self._size])
            self._is_exhausted = not self._held
        return self._held.pop(0) if self._held else None


def exhaust_queue(counter: Counter) -> None:
    """Nobody gets another ticket: a rank that failed saves the others the work."""
    counter.add("next_ticket", _EXHAUSTED)


def batch_size(num_problems: int, num_slots: int) -> int:
    """About eight tickets for each slot of all ranks, so that the last ones to be drawn are small."""
    return max(1, min(_MAX_BATCH, num_problems // (8 * num_slots * distributed.environment().world_size)))
