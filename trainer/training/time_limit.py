"""Set the deadline of a run from Slurm's time limit and `time_limit_seconds`, and estimate the duration of a save."""

import hashlib
import os
import secrets
import time

from trainer.errors import UserError
from trainer.runtime import distributed
from trainer.runtime.stop_request import StopRequest
from trainer.storage.manifest import RunFacts
from trainer.storage.run_directory import RunDirectory

_PROBE_BYTES = 16 << 20
# Bytes per parameter in a checkpoint. Rank 0 writes the weights (fp32; bf16 weights take half). All ranks together write
# the fp32 master weights and Adam's two moments.
_WEIGHT_BYTES, _OPTIMIZER_BYTES = 4, 12


def set_deadline(stop: StopRequest, time_limit_seconds: float, run: RunDirectory, facts: RunFacts) -> None:
    """Collective. Set the deadline of `stop` to the earlier of the Slurm job's limit and `time_limit_seconds`.

    `time_limit_seconds` counts from `stop.started`; 0: no limit. Without any limit, no deadline is set. Raises UserError if
    the remaining time is too short to save a single checkpoint.
    """
    job = distributed.seconds_left_of_job(os.environ) if distributed.is_main_process() else None
    job_seconds = distributed.broadcast_object(job)
    own_seconds = stop.started + time_limit_seconds - time.monotonic() if time_limit_seconds else None
    limits = [seconds for seconds in (job_seconds, own_seconds) if seconds is not None]
    if limits:
        save_seconds = _estimate_save_seconds(run, facts)
        if min(limits) < save_seconds:
            raise UserError(
                f"the time limit leaves {min(limits):.1f} s, and one checkpoint takes about {save_seconds:.1f} s here: "
                "nothing could be saved; ask for more time (Slurm's --time, or time_limit_seconds)"
            )
        stop.set_deadline(min(limits), save_seconds)


def _estimate_save_seconds(run: RunDirectory, facts: RunFacts) -> float:
    """Collective. Estimate the duration of a save from the speed at which rank 0 writes, flushes and digests 16 MiB.

    Raises UserError on every rank if the run directory cannot be written.
    """
    speed, remedy = None, "free disk space, or give another output_dir"
    with distributed.errors_on_all_ranks(
        lambda problem: f"{run.path} cannot be written: {problem.strerror}; {remedy}"
    ):
        if distributed.is_main_process():
            speed = _measure_bytes_per_second(run)
    bytes_per_parameter = _WEIGHT_BYTES + _OPTIMIZER_BYTES / facts["world_size"]
    return float(facts["num_parameters"] * bytes_per_parameter / distributed.broadcast_object(speed))


def _measure_bytes_per_second(run: RunDirectory) -> float:
    run.path.mkdir(parents=True, exist_ok=True)
    probe = run.path / f".probe-{secrets.token_hex(4)}.tmp"
    content, digest = os.urandom(1 << 20), hashlib.sha256()
    start = time.perf_counter()
    try:
        with open(probe, "wb") as file:
            for _ in range(_PROBE_BYTES >> 20):
                file.write(content)
                digest.update(content)
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)
    return _PROBE_BYTES / (time.perf_counter() - start)
