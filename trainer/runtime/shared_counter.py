"""Named integers that all ranks of a job share: over one-sided MPI, over a TCP store, or within one process."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

from trainer.runtime import distributed
from trainer.runtime.distributed import DistributedEnvironment


class Counter(Protocol):
    """Named integers shared by all ranks, from 0."""

    def add(self, name: str, amount: int) -> int:
        """Add at once for all ranks; the value before."""

    def serve(self) -> None:
        """Called often: lets through what other ranks ask of this one."""

    def finish(self) -> None:
        """Collective: no rank adds any more."""


class ProcessCounter:
    """For one process."""

    def __init__(self) -> None:
        self._values: defaultdict[str, int] = defaultdict(int)

    def add(self, name: str, amount: int) -> int:
        before = self._values[name]
        self._values[name] += amount
        return before

    def serve(self) -> None:
        pass

    def finish(self) -> None:
        pass


class StoreCounter:
    """On a TCP store that rank 0 serves from a thread of its own. Collective."""

    def __init__(self, environment: DistributedEnvironment) -> None:
        from torch.distributed import TCPStore

        # MASTER_ADDR reaches rank 0 from everywhere; the port is any free one, and the process group tells it.
        host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=60)
        if environment.rank == 0:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        port = distributed.broadcast_object(self._store.port if environment.rank == 0 else None)
        if environment.rank != 0:
            self._store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)

    def add(self, name: str, amount: int) -> int:
        return self._store.add(name, amount) - amount

    def serve(self) -> None:
        pass  # a thread of the store does

    def finish(self) -> None:
        distributed.barrier()  # rank 0 serves until the last has asked


class MPICounter:
    """In a window of rank 0's memory, by one-sided MPI operations. Collective.

    A passive target on another host makes progress only inside MPI calls: rank 0 calls `serve` at every step, and
    `finish` comes before any wait that is not MPI's, or whoever still asks would wait for rank 0, and rank 0 for him.
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
def shared_counter(names: Sequence[str]) -> Iterator[Counter]:
    """The counter for the way this world was launched. Collective at both ends; the block must not raise on one
    rank alone (see `gather.errors_together`)."""
    environment = distributed.environment()
    counter: Counter
    if environment.world_size == 1:
        counter = ProcessCounter()
    elif environment.launcher == "mpi":
        counter = MPICounter(names)
    else:
        counter = StoreCounter(environment)
    yield counter
    counter.finish()
