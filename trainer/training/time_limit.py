"""How much time a run has, and how much of it one checkpoint takes before any was written."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from typing import Any

from trainer.errors import UserError
from trainer.runtime import distributed
from trainer.runtime.stop_request import StopRequest
from trainer.storage.run_directory import RunDirectory

_PROBE_BYTES = 16 << 20
# fp32 weights by rank 0, and over all ranks fp32 masters and two moments of Adam; bf16 weights are half of it.
_BYTES_OF_WEIGHTS, _BYTES_OF_OPTIMIZER = 4, 12


def set_deadline(
    stop: StopRequest, time_limit_seconds: float, run: RunDirectory, facts: dict[str, Any]
) -> None:
    """Collective. Have `stop` asked for in time for a last save: before Slurm's limit of the job, and before our own.

    Raises UserError, before a model is built, if there is no time for a single checkpoint.
    """
    left = _seconds_left(time_limit_seconds, stop.started)
    if left is None:
        return
    save = _estimated_save_seconds(run, facts)
    if left < save:
        raise UserError(
            f"the time limit leaves {left:.1f} s, and one checkpoint takes about {save:.1f} s here: nothing could be "
            "kept; ask for more time (Slurm's --time, or time_limit_seconds)"
        )
    stop.set_deadline(left, save)


def _seconds_left(time_limit_seconds: float, started: float) -> float | None:
    """Collective. Until the Slurm job's limit or our own, counted from `started` (monotonic); None: no limit."""
    job = distributed.seconds_left_of_job(os.environ) if distributed.is_main_process() else None
    limits = [distributed.broadcast_object(job)]
    if time_limit_seconds:
        limits.append(started + time_limit_seconds - time.monotonic())
    return min((limit for limit in limits if limit is not None), default=None)


def _estimated_save_seconds(run: RunDirectory, facts: dict[str, Any]) -> float:
    """Collective. Estimated from how fast rank 0 writes, flushes and digests a few megabytes where checkpoints go.

    Raises UserError, on every rank, where nothing can be written.
    """
    speed, fault = None, None
    if distributed.is_main_process():
        try:
            speed = _bytes_per_second(run)
        except OSError as error:
            fault = f"nothing can be written into {run.path}: {error.strerror}; make room, or give another output_dir"
    distributed.raise_on_all_ranks(fault)
    speed = distributed.broadcast_object(speed)
    optimizer = _BYTES_OF_OPTIMIZER / facts["world_size"]
    return facts["num_parameters"] * (_BYTES_OF_WEIGHTS + optimizer) / speed


def _bytes_per_second(run: RunDirectory) -> float:
    run.path.mkdir(parents=True, exist_ok=True)
    probe = run.path / f".probe-{secrets.token_hex(4)}.tmp"
    content = os.urandom(1 << 20)
    start = time.perf_counter()
    try:
        with open(probe, "wb") as file:
            digest = hashlib.sha256()
            for _ in range(_PROBE_BYTES >> 20):
                file.write(content)
                digest.update(content)
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)
    return _PROBE_BYTES / (time.perf_counter() - start)
