"""Paths of the files that runs, evaluations, studies and annotations write. Other modules must not spell these names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_CHECKPOINT = re.compile(r"step-(\d{6,})")


def evaluation_name(*parts: str, calculator: bool = True, temperature: float = 0.0, seed: int = 0) -> str:
    """Return `<data>-<split>-<mode>`, with suffixes for settings other than the default."""
    name = list(parts)
    if not calculator:
        name += ["no_calculator"]
    if temperature:
        name += [f"t{temperature:g}", f"s{seed}"]
    return "-".join(name)


def parse_run_name(name: str) -> tuple[str, str, str, int | None]:
    """Split <data>.<method>.<model>.s<seed> into (data, method, model, seed); the model may contain dots.

    Returns ("", "", "", None) for any other name.
    """
    parts = name.split(".")
    if len(parts) < 4 or not parts[-1].startswith("s") or not parts[-1][1:].isdecimal():
        return "", "", "", None
    return parts[0], parts[1], ".".join(parts[2:-1]), int(parts[-1][1:])


@dataclass(frozen=True)
class EvaluationDirectory:
    """Paths in `evaluation/<name>/`: predictions of each rank, merged predictions, and results."""

    path: Path

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.jsonl"

    @property
    def rank_files(self) -> Path:
        return self.path / "parts"

    @property
    def restarts(self) -> Path:
        """Count of scheduler restarts (restarts.py)."""
        return self.path / "restarts.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"


@dataclass(frozen=True)
class RunDirectory:
    """Paths in `runs/<study>/<run>/`, the output of one training run."""

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
        """The model's config and tokenizer without weights; every checkpoint contains a copy."""
        return self.path / "model"

    @property
    def restarts(self) -> Path:
        """Count of scheduler restarts (restarts.py)."""
        return self.path / "restarts.json"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb_id"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def log(self, stage: str) -> Path:
        """Return the log file of a stage, e.g. "train"."""
        return self.logs / f"{stage}.log"

    @property
    def lock(self) -> Path:
        """Exists while a job trains here (directory_lock.py)."""
        return self.path / "lock"

    @property
    def heartbeats(self) -> Path:
        """One file per rank: heartbeat counter, last step and process identity."""
        return self.path / "heartbeats"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Return the steps of the checkpoint directories on disk, ascending, without checking that they are valid."""
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
    """Paths in `runs/<study>/`: the runs of a study and their report."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "study.yaml"

    @property
    def lock(self) -> Path:
        """Exists while a process runs or submits the study (directory_lock.py)."""
        return self.path / "lock"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def slurm(self) -> Path:
        """Batch scripts, the list of submitted jobs, and their output."""
        return self.path / "slurm"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def run(self, name: str) -> RunDirectory:
        return RunDirectory(self.path / name)

    def runs(self) -> list[RunDirectory]:
        """Return the runs on disk, sorted by name: the folders that contain run settings."""
        if not self.path.is_dir():
            return []
        found = (RunDirectory(path) for path in sorted(self.path.iterdir()) if path.is_dir())
        return [run for run in found if run.settings.is_file()]


def pair_run(method: str, runs: list[RunDirectory]) -> RunDirectory | None:
    """Return the run directory for evaluating the models of several runs together by `method`; nothing is trained there.

    None if the runs differ in study, data or seed. The name joins the names of different models with "+".
    """
    names = [parse_run_name(run.name) for run in runs]
    origins = {(run.path.resolve().parent, name[0], name[3]) for run, name in zip(runs, names, strict=True)}
    if len(origins) != 1:
        return None
    data, _, _, seed = names[0]
    models = "+".join(dict.fromkeys(model for _, _, model, _ in names))
    return RunDirectory(runs[0].path.parent / f"{data}.{method}.{models}.s{seed}") if data else None


@dataclass(frozen=True)
class AnnotationDirectory:
    """Paths in `annotations/<name>/`: a teacher's responses, and the problems with the accepted steps."""

    path: Path

    @property
    def responses(self) -> Path:
        """All paid responses, one per line; every run appends."""
        return self.path / "responses.jsonl"

    @property
    def corrupt_lines(self) -> Path:
        """Half-written lines removed from the end of `responses`."""
        return self.path / "responses.damaged.txt"

    @property
    def lock(self) -> Path:
        """Exists while a process annotates here (directory_lock.py)."""
        return self.path / "lock"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def result(self) -> Path:
        """The published directory: annotated.jsonl, rejected.jsonl, summary.json, ..."""
        return self.path / "result"
