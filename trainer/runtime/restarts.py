"""Limit on scheduler restarts without progress, so that a job that always fails is not requeued forever.

This module must not import heavy libraries, because restarts must be counted even if such an import fails.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.runtime import distributed
from trainer.storage import atomic_dir


def record_restart(file: Path, progress: int, max_restarts: int) -> None:
    """Record this start of the job in `file` on rank 0. `progress` must grow with every checkpoint or saved answer.

    Raises UserError if the scheduler has restarted the job more than `max_restarts` times since `progress` last grew. A
    manual start resets the count of these restarts to 0.
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
            f"look for the cause in the logs, then start the job again ({file} has the number of restarts)"
        )


def read_restarts(file: Path) -> dict[str, Any]:
    """Return the last record of `file`. If the file is missing or invalid, return zeros and empty strings.

    Keys: restarts (number of all restarts by the scheduler), without_progress (number of restarts since `progress` last
    grew), progress, job (Slurm job id), time (of the record).
    """
    empty: dict[str, Any] = {"restarts": 0, "without_progress": 0, "progress": 0, "job": "", "time": ""}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return {key: type(default)(record[key]) for key, default in empty.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return empty
