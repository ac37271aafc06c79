"""The only file that knows output names: where a run, an evaluation and a study keep what they write."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_CHECKPOINT = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class EvaluationDirectory:
    """`evaluation/<name>/`: predictions of every rank, their union, and the numbers."""

    path: Path

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.jsonl"

    @property
    def parts(self) -> Path:
        return self.path / "parts"

    @property
    def logs(self) -> Path:
        return self.path / "logs"


@dataclass(frozen=True)
class RunDirectory:
    """`runs/<study>/<run>/`: everything one training run leaves behind."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def settings(self) -> Path:
        return self.path / "settings.yaml"

    @property
    def ds_config(self) -> Path:
        return self.path / "ds_config.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        """The student's config and tokenizer (no weights); every checkpoint carries a copy."""
        return self.path / "model"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb_id"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def log(self, stage: str) -> Path:
        """What the stage's process printed, e.g. of "train"."""
        return self.logs / f"{stage}.log"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the checkpoint directories on disk, ascending; whether they are valid is for the reader to check."""
        if not self.checkpoints.is_dir():
            return []
        matches = (_CHECKPOINT.fullmatch(path.name) for path in self.checkpoints.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluation"

    def evaluation(self, name: str) -> EvaluationDirectory:
        return EvaluationDirectory(self.evaluations / name)

    def evaluation_names(self) -> list[str]:
        if not self.evaluations.is_dir():
            return []
        return sorted(path.name for path in self.evaluations.iterdir() if path.is_dir())


@dataclass(frozen=True)
class StudyDirectory:
    """`runs/<study>/`: the runs of a study and the report over them."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "study.yaml"

    @property
    def process(self) -> Path:
        """Which process runs the study at the moment."""
        return self.path / "process.json"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def run(self, name: str) -> RunDirectory:
        return RunDirectory(self.path / name)

    def runs(self) -> list[RunDirectory]:
        """Runs on disk, by name: the folders that hold a run's settings."""
        if not self.path.is_dir():
            return []
        found = (RunDirectory(path) for path in sorted(self.path.iterdir()) if path.is_dir())
        return [run for run in found if run.settings.is_file()]
