"""Writer of metrics.jsonl (rank 0, one line a step) and of the same numbers to W&B.

A step repeated after a restart has several lines: the last one is valid.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from trainer.runtime import distributed
from trainer.settings import TrainSettings
from trainer.storage import atomic_dir
from trainer.storage.configuration import to_dict
from trainer.storage.json_lines import read_json_lines
from trainer.storage.run_directory import RunDirectory


class MetricsLog:
    """Appends to the run's metrics file; each line is passed to the operating system before the next step."""

    def __init__(self, run: RunDirectory, settings: TrainSettings, facts: dict[str, Any]):
        self._file = None
        self._wandb: Any = None
        self.evaluated_steps: set[int] = set()  # filled on rank 0 only
        if distributed.is_main_process():
            for _, line in read_json_lines(run.metrics):
                if line and "evaluation" in line:
                    self.evaluated_steps.add(line["step"])
            self._file = open(run.metrics, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            content = run.metrics.read_bytes()
            if content and not content.endswith(b"\n"):
                self._file.write("\n")  # ends the partial line of a killed process; readers skip it
            if settings.report_to == "wandb":
                self._wandb = _start_wandb(run, settings, facts)

    def write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
        if self._wandb is not None:
            step = line["step"]
            values = {key: value for key, value in line.items() if key != "step" and value is not None}
            self._wandb.log(values, step=step)

    def close(self, finished: bool) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if finished else 1)


def _start_wandb(run: RunDirectory, settings: TrainSettings, facts: dict[str, Any]) -> Any:
    """Start or resume the W&B run whose id is stored in the run directory."""
    import wandb

    if not run.wandb_id.exists():
        atomic_dir.write_text(run.wandb_id, secrets.token_hex(8) + "\n")
    return wandb.init(
        project=settings.wandb_project,
        name=run.name,
        id=run.wandb_id.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(run.logs),
        config={**to_dict(settings), **facts},
    )
