"""Rendezvous of the ranks at MASTER_ADDR:MASTER_PORT, and timeouts of process groups."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta

from trainer.errors import UserError

_SLACK_SECONDS = 2.0  # after the rendezvous timeout, for torch's own exception
_RENDEZVOUS_SECONDS = 300  # ranks start together, but a node may import over a slow network


def init_process_group(backend: str, rank: int, world_size: int, timeout_seconds: int) -> None:
    """Open the default process group; `timeout_seconds` limits its collectives. MASTER_ADDR and MASTER_PORT must be set.

    Raises UserError on rank 0 if the port is in use, and on the other ranks if rank 0 does not answer in time.
    """
    import torch.distributed as dist

    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    wait_seconds = min(timeout_seconds, _RENDEZVOUS_SECONDS)
    timeout = timedelta(seconds=timeout_seconds)

    def connect() -> None:
        store, _, _ = next(
            dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=wait_seconds))
        )
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        store.set_timeout(timeout)

    try:
        _run_with_timeout(wait_seconds + _SLACK_SECONDS, connect)
    except (dist.DistError, TimeoutError) as error:
        if rank == 0 and "EADDRINUSE" in str(error):
            raise UserError(
                f"another program listens at {where}, perhaps another training: start this one on another port "
                "(deepspeed --master_port N, torchrun --master-port N)"
            ) from None
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the {world_size} ranks did not meet at {where} in {wait_seconds} s: {reason}"
        ) from None


def free_port() -> int:
    """Return an unused TCP port."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _run_with_timeout(seconds: float, action: Callable[[], None]) -> None:
    """Run `action` in a thread. Raises its exception, or TimeoutError after `seconds` (the thread keeps running).

    torch waits forever for the first reply of a listener that is not torch's, and handles no signals meanwhile.
    """
    errors: list[BaseException | None] = []

    def target() -> None:
        try:
            action()
            errors.append(None)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target, name="rendezvous", daemon=True)
    thread.start()
    thread.join(seconds)
    if not errors:
        raise TimeoutError("the program that listens there does not answer")
    if errors[0] is not None:
        raise errors[0]
