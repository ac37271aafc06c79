"""Named integer counters shared by all ranks: over one-sided MPI, over a TCP store, or within one process."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from trainer.runtime import distributed
from trainer.runtime.distributed import DistributedEnvironment


class SharedCounter:
    """Base class of counters: named integers shared by all ranks, initially 0."""

    def add(self, name: str, amount: int) -> int:
        """Add atomically and return the previous value."""
        raise NotImplementedError

    def serve(self) -> None:
        """Make progress on other ranks' requests; must be called often. Only MPI's counter needs it."""

    def finish(self) -> None:
        """Collective. Must be called after the last `add`."""


class ProcessCounter(SharedCounter):
    """Counter within one process."""

    def __init__(self) -> None:
        self._values: defaultdict[str, int] = defaultdict(int)

    def add(self, name: str, amount: int) -> int:
        before = self._values[name]
        self._values[name] += amount
        return before


class StoreCounter(SharedCounter):
    """Counter on a TCP store that a thread of rank 0 serves. The constructor is collective."""

    def __init__(self, environment: DistributedEnvironment) -> None:
        from torch.distributed import TCPStore

        host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=60)
        if environment.rank == 0:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        port = distributed.broadcast_object(self._store.port if environment.rank == 0 else None)
        if environment.rank != 0:
            self._store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)

    def add(self, name: str, amount: int) -> int:
        return self._store.add(name, amount) - amount

    def finish(self) -> None:
        distributed.barrier()  # rank 0 must serve until the last `add`


class MPICounter(SharedCounter):
    """Counter in a window of rank 0's memory, with one-sided MPI operations. The constructor is collective.

    A passive target on another host makes progress only inside MPI calls: rank 0 must call `serve` at every step, and
    `finish` before it blocks outside MPI, or it deadlocks with a rank inside `add`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        from mpi4py import MPI

        self._mpi: Any = MPI
        self._names = list(names)
        communicator = MPI.COMM_WORLD
        size = 8 * len(names) if communicator.Get_rank() == 0 else 0
        self._window = MPI.Win.Allocate(size, 8, comm=communicator)
        if size:
            self._window.tomemory()[:] = bytes(size)
        communicator.Barrier()
        self._window.Lock_all()

    def add(self, name: str, amount: int) -> int:
        change, before = array("q", [amount]), array("q", [0])
        self._window.Fetch_and_op(
            [change, self._mpi.INT64_T], [before, self._mpi.INT64_T], 0, self._names.index(name)
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
def shared_counter(names: Sequence[str]) -> Iterator[SharedCounter]:
    """Context manager that yields a counter for this process's launcher.

    Collective on entry and exit: the block must raise on all ranks or on none.
    """
    environment = distributed.environment()
    counter: SharedCounter
    if environment.world_size == 1:
        counter = ProcessCounter()
    elif environment.launcher == "mpi":
        counter = MPICounter(names)
    else:
        counter = StoreCounter(environment)
    yield counter
    counter.finish()
