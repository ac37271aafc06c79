"""metrics.jsonl on rank 0, one line a step; the same numbers to W&B if asked.

After a restart a step may be there twice: the last line of a step counts.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from typing import Any

from trainer.runtime import distributed
from trainer.settings import TrainSettings
from trainer.storage import atomic_dir
from trainer.storage.configuration import to_dict
from trainer.storage.run_directory import RunDirectory


class MetricsLog:
    """Appends to the run's metrics file; every line reaches the disk's cache before the next step begins."""

    def __init__(self, run: RunDirectory, settings: TrainSettings, facts: dict[str, Any]):
        self._file = None
        self._wandb: Any = None
        self.evaluated_steps: set[int] = set()  # rank 0's are the truth
        if distributed.is_main_process():
            _remove_partial_line(run)
            self.evaluated_steps = _evaluated_steps(run)
            self._file = open(run.metrics, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
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


def _remove_partial_line(run: RunDirectory) -> None:
    """A killed process may leave half a line; end it, so that the next line stands alone (readers skip the half)."""
    if run.metrics.exists():
        with open(run.metrics, "rb+") as file:
            file.seek(0, 2)
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")


def _evaluated_steps(run: RunDirectory) -> set[int]:
    """Steps whose periodic evaluation is in the file."""
    if not run.metrics.exists():
        return set()
    steps = set()
    with open(run.metrics, encoding="utf-8", errors="replace") as file:
        for line in file:
            if '"evaluation": {' in line:
                with contextlib.suppress(ValueError):  # the half of a line that a kill left
                    steps.add(json.loads(line)["step"])
    return steps


def _start_wandb(run: RunDirectory, settings: TrainSettings, facts: dict[str, Any]) -> Any:
    """One W&B run for one run directory, across restarts: its id is kept in the directory. Works offline."""
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
