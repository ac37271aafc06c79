"""Writer of metrics.jsonl on rank 0: one line per step and per validation. The same numbers go to W&B, if it is enabled.

Some steps are repeated after a restart. Such a step has several lines, and readers must use the last line of the step.
"""

import json
import secrets
from dataclasses import asdict
from typing import Any

from trainer.runtime import distributed
from trainer.settings import TrainSettings
from trainer.storage import atomic_dir
from trainer.storage.json_lines import read_json_lines
from trainer.storage.manifest import RunFacts, StepMetrics, ValidationLine
from trainer.storage.run_directory import RunDirectory


class MetricsLog:
    """Log that appends to the run's metrics file on rank 0. Each line reaches the operating system before the next step."""

    def __init__(self, run: RunDirectory, settings: TrainSettings, facts: RunFacts):
        self._file = None
        self._wandb: Any = None
        self.evaluated_steps: set[int] = set()  # steps with a validation before this start; rank 0 only
        if distributed.is_main_process():
            lines = (line for _, line in read_json_lines(run.metrics) if line)
            self.evaluated_steps = {line["step"] for line in lines if "evaluation" in line}
            self._file = open(run.metrics, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            content = run.metrics.read_bytes()
            if content and not content.endswith(b"\n"):
                self._file.write("\n")  # ends the partial line of a killed process; readers skip this line
            if settings.report_to == "wandb":
                self._wandb = _start_wandb(run, settings, facts)

    def write(self, line: StepMetrics | ValidationLine) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
        if self._wandb is not None:
            values = {key: value for key, value in line.items() if key != "step" and value is not None}
            self._wandb.log(values, step=line["step"])

    def close(self, finished: bool) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if finished else 1)


def _start_wandb(run: RunDirectory, settings: TrainSettings, facts: RunFacts) -> Any:
    import wandb

    if not run.wandb_id.exists():
        atomic_dir.write_text(run.wandb_id, secrets.token_hex(8) + "\n")
    return wandb.init(
        project=settings.wandb_project,
        name=run.name,
        id=run.wandb_id.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(run.logs),
        config={**asdict(settings), **facts},
    )
