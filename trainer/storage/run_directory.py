"""The only file that knows output names: where a run, an evaluation and a study keep what they write."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_CHECKPOINT = re.compile(r"step-(\d{6,})")


def evaluation_name(*parts: str, calculator: bool = True, temperature: float = 0.0, seed: int = 0) -> str:
    """`<data>-<split>-<mode>`, and what differs from the usual, so that both can stand side by side."""
    name = list(parts)
    if not calculator:
        name += ["no_calculator"]
    if temperature:
        name += [f"t{temperature:g}", f"s{seed}"]
    return "-".join(name)


def parse_run_name(name: str) -> tuple[str, str, str, int | None]:
    """<data>.<method>.<model>.s<seed> -> its parts; a model's name may hold dots. Other names say nothing."""
    parts = name.split(".")
    if len(parts) < 4 or not parts[-1].startswith("s") or not parts[-1][1:].isdecimal():
        return "", "", "", None
    return parts[0], parts[1], ".".join(parts[2:-1]), int(parts[-1][1:])


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
    def rank_files(self) -> Path:
        return self.path / "parts"

    @property
    def restarts(self) -> Path:
        """How often a scheduler started the evaluation again."""
        return self.path / "restarts.json"

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
    def restarts(self) -> Path:
        """How often a scheduler started the training again."""
        return self.path / "restarts.json"

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
    def lock(self) -> Path:
        """A directory while a job trains here (lock.py)."""
        return self.path / "lock"

    @property
    def heartbeats(self) -> Path:
        """A small file a rank: where it is and when it last moved."""
        return self.path / "heartbeats"

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
    def lock(self) -> Path:
        """A directory while a process runs or submits the study (lock.py)."""
        return self.path / "lock"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def slurm(self) -> Path:
        """Batch scripts, which jobs were submitted, and what they printed."""
        return self.path / "slurm"

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


def pair_run(method: str, runs: list[RunDirectory]) -> RunDirectory | None:
    """Where the students of several runs answer together by `method`: a run beside theirs, that trains nothing.

    None if they are not of one study, or differ in data or seed. Models that differ are both in its name.
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
    """`annotations/<name>/`: what a teacher answered, and the problems with the steps that were kept."""

    path: Path

    @property
    def responses(self) -> Path:
        """Every answer that was paid for, one a line, appended to by every run."""
        return self.path / "responses.jsonl"

    @property
    def corrupt_lines(self) -> Path:
        """Half-written lines that were cut off the end of `responses`."""
        return self.path / "responses.damaged.txt"

    @property
    def lock(self) -> Path:
        """A directory while a process annotates here (lock.py)."""
        return self.path / "lock"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def result(self) -> Path:
        """The finished directory: annotated.jsonl, rejected.jsonl, summary.json, ..."""
        return self.path / "result"
