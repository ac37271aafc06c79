"""Limit on scheduler restarts without progress, so that a job that fails before each checkpoint is not requeued forever.

Must not import heavy libraries: a restart is recorded before anything that can fail.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.runtime import distributed
from trainer.storage import atomic_dir


def record_restart(file: Path, progress: int, max_restarts: int) -> None:
    """Record this start in `file`; rank 0 only. `progress` must grow with every checkpoint or saved answer.

    Raises UserError if the scheduler has restarted the job more than `max_restarts` times since `progress` last grew. A
    manual start resets the count.
    """
    if not distributed.is_main_process():
        return
    previous = read_restarts(file)
    is_restart = distributed.num_job_restarts(os.environ) > 0
    is_stuck = is_restart and progress <= previous["progress"]
    without_progress = previous["without_progress"] + 1 if is_stuck else int(is_restart)
    record = {
        "restarts": previous["restarts"] + is_restart,
        "without_progress": without_progress,
        "progress": max(progress, previous["progress"]) if is_restart else progress,
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    atomic_dir.write_text(file, json.dumps(record) + "\n")
    if without_progress > max_restarts:
        raise UserError(
            f"restarted {without_progress} times without getting further than {progress} (max_restarts is {max_restarts}); "
            f"look at the logs for the cause, then start it again ({file} has the count)"
        )


def read_restarts(file: Path) -> dict[str, Any]:
    """Return the last record of `file`, or zeros if it is missing or invalid.

    Keys: restarts (by the scheduler, in total), without_progress (those since `progress` grew), progress, job, time.
    """
    record: dict[str, Any] = {"restarts": 0, "without_progress": 0, "progress": 0, "job": "", "time": ""}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {key: type(default)(found[key]) for key, default in record.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return record
