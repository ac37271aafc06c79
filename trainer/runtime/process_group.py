"""Where the ranks meet: rank 0 listens on MASTER_PORT, the others come to it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta

from trainer.errors import UserError

_SLACK_SECONDS = 2.0  # in which torch's own reason may still come
_WAIT_SECONDS = 300  # ranks of one job start together, but one node may have to import over a slow network


def init_process_group(backend: str, rank: int, world_size: int, timeout_seconds: int) -> None:
    """Open the process group; its collectives wait for `timeout_seconds`. The environment is complete.

    Raises UserError on rank 0 if another program has the port, and on the others if rank 0 does not answer in time.
    """
    import torch.distributed as dist

    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    wait = min(timeout_seconds, _WAIT_SECONDS)
    limit, timeout = timedelta(seconds=wait), timedelta(seconds=timeout_seconds)

    def meet() -> None:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=limit))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        store.set_timeout(timeout)

    try:
        _run_with_timeout(wait + _SLACK_SECONDS, meet)
    except (dist.DistError, TimeoutError) as error:
        if rank == 0 and "EADDRINUSE" in str(error):
            raise UserError(
                f"another program listens at {where}, perhaps another training: start this one on another port "
                "(deepspeed --master_port N, torchrun --master-port N)"
            ) from None
        reason = str(error).splitlines()[0]
        raise UserError(f"the {world_size} ranks did not meet at {where} in {wait} s: {reason}") from None


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def set_group_timeouts(timeout_seconds: int) -> None:
    """Give every process group this limit: DeepSpeed's own keep torch's 30 minutes, whatever the first was given."""
    import torch.distributed as dist

    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def _run_with_timeout(seconds: float, action: Callable[[], None]) -> None:
    """Do it; raises what it raises, or TimeoutError if it takes longer.

    In a thread, because torch waits without an end for the first word of a listener that is not torch's, and because no
    signal is handled while it waits. (The thread is left behind: the process ends.)
    """
    outcome: list[BaseException | None] = []

    def act() -> None:
        try:
            action()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=act, name="rendezvous", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError("who listens there does not answer")
    if outcome[0] is not None:
        raise outcome[0]
