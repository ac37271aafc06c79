"""Rendezvous of the ranks at MASTER_ADDR:MASTER_PORT with a timeout, start of MPI, and search for a free port."""

import os
import signal
import socket
import threading
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any

from trainer.errors import UserError, first_line

_SLACK_SECONDS = 2.0  # extra wait after torch's timeout, so that torch's own exception is raised first
_RENDEZVOUS_SECONDS = 300  # maximum wait for all ranks; a node may load packages over a slow network


def init_process_group(backend: str, rank: int, world_size: int, timeout_seconds: int) -> None:
    """Open the default process group. `timeout_seconds` limits each collective. MASTER_ADDR and MASTER_PORT must be set.

    Raises UserError on rank 0 if the port is in use, and on every rank if the ranks do not connect within
    `timeout_seconds` or _RENDEZVOUS_SECONDS, whichever is shorter.
    """
    import torch.distributed as dist

    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    wait_seconds = min(timeout_seconds, _RENDEZVOUS_SECONDS)
    timeout = timedelta(seconds=timeout_seconds)
    connected: Future[None] = Future()

    def connect() -> None:
        try:
            rendezvous = dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=wait_seconds))
            store, _, _ = next(rendezvous)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
            store.set_timeout(timeout)
            connected.set_result(None)
        except BaseException as error:
            connected.set_exception(error)

    # Connect in a thread: if another program listens at the port, torch waits forever and handles no signals.
    threading.Thread(target=connect, name="rendezvous", daemon=True).start()
    try:
        if not wait([connected], wait_seconds + _SLACK_SECONDS).done:
            raise TimeoutError("the program that listens there does not answer")
        connected.result()
    except (dist.DistError, TimeoutError) as error:
        if rank == 0 and "EADDRINUSE" in str(error):
            raise UserError(
                f"another program listens at {where}, perhaps another training: start this training on another port "
                "(deepspeed --master_port N, torchrun --master-port N)"
            ) from None
        text = f"the {world_size} ranks did not meet at {where} in {wait_seconds} s"
        raise UserError(f"{text}: {first_line(error)}") from None


def initialize_mpi() -> Any:
    """Return mpi4py's module MPI after MPI_Init, which waits for all ranks.

    MPI_Init holds the GIL, so Python's signal handlers cannot run. During MPI_Init, Ctrl-C ends the process without them.
    """
    is_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        from mpi4py import MPI
    finally:
        signal.signal(signal.SIGINT, handler)
    return MPI


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
