"""How often a scheduler has started a job again, and an end to it when the job gets no further.

Preemption, a lost node and a time limit start a job again and again, as they should; but a job that dies on the way to
its first checkpoint would do so for ever. Imports nothing heavy: a restart is counted before anything can go wrong.
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
    """Rank 0: write this start into `file`; `progress` is a number that grows whenever something was kept.

    Raises UserError if the scheduler has restarted the job more than `most` times since `progress` last grew. A start
    by a person begins a new count.
    """
    if not distributed.is_main_process():
        return
    record = read(file)
    automatic = distributed.restarts_of_job(os.environ) > 0
    same = automatic and progress <= record["progress"]
    without_progress = record["without_progress"] + 1 if same else int(automatic)
    now = {
        "restarts": record["restarts"] + automatic,
        "without_progress": without_progress,
        "progress": max(progress, record["progress"]) if automatic else progress,
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    atomic_dir.write_text(file, json.dumps(now) + "\n")
    if without_progress > max_restarts:
        raise UserError(
            f"restarted {without_progress} times without getting further than {progress}; this is the end of it "
            f"(max_restarts is {max_restarts}). Look at the logs for the cause, then start it again ({file} has the count)"
        )


def read(file: Path) -> dict[str, Any]:
    """restarts: automatic starts in all; without_progress: those since `progress` grew; job: the last one's number."""
    record: dict[str, Any] = {"restarts": 0, "without_progress": 0, "progress": 0, "job": "", "time": ""}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {key: type(default)(found[key]) for key, default in record.items()}
    except FileNotFoundError:
        return record
    except (OSError, ValueError, KeyError, TypeError):
        return record  # a count, not a result: a damaged file begins a new one
