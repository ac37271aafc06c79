"""Named integer counters that all ranks share, over one-sided MPI or a TCP store. A single process uses a dict."""

import contextlib
import os
from abc import ABC, abstractmethod
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from trainer.runtime import distributed
from trainer.runtime.distributed import DistributedEnvironment


class SharedCounter(ABC):
    """Base class of counters: named integers shared by all ranks, initially 0."""

    @abstractmethod
    def add(self, name: str, amount: int) -> int:
        """Add `amount` to the integer `name` atomically. Return the integer's previous value."""

    def serve(self) -> None:  # noqa: B027
        """Let MPI execute the operations of other ranks. Must be called often. A no-op in all classes except `MPICounter`."""

    def finish(self) -> None:  # noqa: B027
        """Collective. End the use of the counter. Must be called after the rank's last `add`."""


class ProcessCounter(SharedCounter):
    def __init__(self) -> None:
        self._values: defaultdict[str, int] = defaultdict(int)

    def add(self, name: str, amount: int) -> int:
        before = self._values[name]
        self._values[name] += amount
        return before


class StoreCounter(SharedCounter):
    """Counter on a TCP store that runs in a thread of rank 0. The constructor is collective."""

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
        distributed.barrier()  # the store on rank 0 must exist until the last `add` of every rank


class MPICounter(SharedCounter):
    """Counter in a window of rank 0's memory, with one-sided MPI operations. The constructor is collective.

    Some MPI libraries execute operations of other hosts only while rank 0 is inside an MPI call. So rank 0 must call
    `serve` often, and `finish` before it blocks outside MPI. Otherwise, rank 0 and a rank inside `add` can deadlock.
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
    """Context manager that yields a counter of the class that fits this process's launcher.

    Collective on entry and exit. If the block raises an exception on one rank, it must raise an exception on every rank.
    Otherwise the other ranks hang at the exit.
    """
    environment = distributed.environment()
    counter: SharedCounter = ProcessCounter()
    if environment.world_size > 1:
        counter = MPICounter(names) if environment.launcher == "mpi" else StoreCounter(environment)
    yield counter
    counter.finish()
