"""Writer of metrics.jsonl on rank 0: one line per step and per validation. The same numbers go to W&B, if it is enabled.

Some steps are repeated after a restart. Such a step has several lines, and readers must use the last line of the step.
"""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.runtime import distributed, terminal
from trainer.settings import TrainSettings
from trainer.storage import atomic_dir
from trainer.storage.json_lines import read_json_lines
from trainer.storage.manifest import RunFacts, StepMetrics, ValidationLine
from trainer.storage.run_directory import RunDirectory


class MetricsLog:
    """Log that appends to the run's metrics file on rank 0. Each line reaches the operating system before the next step.

    `started`: value of time.monotonic() at the start of this process, for `run_seconds`.
    """

    def __init__(self, run: RunDirectory, settings: TrainSettings, facts: RunFacts, started: float):
        self._file = None
        self._started, self._earlier_seconds = started, 0.0
        self._wandb: Any = None
        self.evaluated_steps: set[int] = set()  # steps with a validation before this start; rank 0 only
        if distributed.is_main_process():
            lines = _read_lines(run.metrics)
            self._earlier_seconds = _run_seconds(lines)
            self.evaluated_steps = {line["step"] for line in lines if "evaluation" in line}
            self._file = open(run.metrics, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            content = run.metrics.read_bytes()
            if content and not content.endswith(b"\n"):
                self._file.write("\n")  # ends the partial line of a killed process; readers skip this line
            if settings.report_to == "wandb":
                self._wandb = _start_wandb(run, settings, facts)

    def run_seconds(self) -> float:
        """Return the time of this start and of all earlier starts, without the pauses between them. Only valid on rank 0."""
        return self._earlier_seconds + time.monotonic() - self._started

    def write_step(self, metrics: StepMetrics) -> None:
        """Write the metrics of a step, with `run_seconds`."""
        self.write({**metrics, "run_seconds": self.run_seconds()})

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


def result_text(metrics: Path, run_seconds: float | None = None) -> str:
    """Return the last losses and the time of a run as text: "loss 0.1234, validation loss 0.2345, 1m30s".

    `metrics`: metrics.jsonl. Without `run_seconds`, the time is that of the file. What the file lacks is left out.
    """
    lines = _read_lines(metrics)
    losses = [line["loss"] for line in lines if "loss" in line]
    validation_losses = [line["evaluation"]["loss"] for line in lines if "evaluation" in line]
    seconds = _run_seconds(lines) if run_seconds is None else run_seconds
    texts = [f"loss {losses[-1]:.4f}"] if losses else []
    texts += [f"validation loss {validation_losses[-1]:.4f}"] if validation_losses else []
    return ", ".join([*texts, *([terminal.duration_text(seconds)] if seconds else [])])


def _read_lines(metrics: Path) -> list[dict[str, Any]]:
    return [line for _, line in read_json_lines(metrics) if line]


def _run_seconds(lines: Sequence[dict[str, Any]]) -> float:
    """Return the last recorded `run_seconds`. If no line has this field, return the time of all steps."""
    recorded = [line["run_seconds"] for line in lines if "run_seconds" in line]
    return float(recorded[-1]) if recorded else sum(line.get("seconds", 0.0) for line in lines)


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
