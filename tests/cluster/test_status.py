"""Parsing of sacct's output, logs and metrics; squeue's output is tested on a real Slurm in test_study_on_slurm.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.cluster import status
from trainer.cluster.slurm import JobState, parse_sacct
from trainer.storage import atomic_dir
from trainer.study import stages
from trainer.study.study_file import Study


def test_sacct() -> None:
    """The format of `sacct --allocations --parsable2 --format=JobID,State,ExitCode,NodeList`."""
    output = "12_0|COMPLETED|0:0|n[1-2]\n12_1|CANCELLED by 1000|0:15|None assigned\n13|OUT_OF_MEMORY|0:125|n1\n14|NODE_FAIL+|1:0|n2\n"
    assert parse_sacct(output) == {
        "12_0": JobState("COMPLETED", "", None, "n[1-2]"),
        "12_1": JobState("CANCELLED", "by 1000", None, "None assigned"),
        "13": JobState("OUT_OF_MEMORY", "exit code 0:125", None, "n1"),
        "14": JobState("NODE_FAIL", "exit code 1:0", None, "n2"),
    }


def test_last_error_is_from_the_last_start(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    assert status.last_error(log) == ""
    header = "=== 2026-01-01T00:00:00+00:00 job 12_0 on n1, restart {}\n"
    log.write_text(
        header.format(0) + "error: the first start\n" + header.format(1) + "a line\nsrun: error: n1\n"
    )
    assert status.last_error(log) == "srun: error: n1"
    with open(log, "a") as file:
        file.write("error: no such file\nsrun: error: n1: task 0: Exited with exit code 2\n")
    assert status.last_error(log) == "error: no such file"


def test_progress_of_a_training_has_step_loss_speed_and_time_left(
    values: dict[str, Any], make_study: Callable[[dict[str, Any]], Study]
) -> None:
    values["train"]["max_steps"] = 100
    stage = next(stage for stage in stages.study_stages(make_study(values)) if stage.kind == "train")
    assert status.progress_text(stage) == "starting"
    assert stage.run is not None
    lines = [
        {"step": step, "total_steps": 100, "loss": 2.5, "seconds": 3.0, "tokens_per_second": 1234.5}
        for step in range(1, 41)
    ]
    atomic_dir.write_text(stage.run.directory.metrics, "".join(json.dumps(line) + "\n" for line in lines))
    assert status.progress_text(stage) == "step 40/100, loss 2.500, 1,234 tokens/s, 3m00s left"
