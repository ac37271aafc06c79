"""State of the stages of a study, read only from disk, so that a killed study can be continued."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.settings import EvaluateSettings, PrepareSettings, TrainSettings
from trainer.storage import atomic_dir
from trainer.storage.json_lines import read_json_lines
from trainer.storage.run_directory import (
    AnnotationDirectory,
    EvaluationDirectory,
    RunDirectory,
    StudyDirectory,
)
from trainer.study.stages import Stage
from trainer.teacher.settings import AnnotateSettings

_TAIL_BYTES = 64 << 10
# Settings that the manifest of an annotation contains.
_ANNOTATION_SETTINGS = (
    *("data", "split", "seed", "max_problems", "style", "gold_hint", "with_facts", "num_samples", "keep_all"),
    *("min_steps", "max_steps", "require_annotations", "decontaminate_ngram"),
    *("temperature", "top_p", "max_new_tokens"),
)
_FINAL_LOSS_STEPS = 20  # the loss of a single step is too noisy


@dataclass(frozen=True)
class Progress:
    """`done` of `total` (0: unknown), and a short note such as the loss."""

    done: int
    total: int
    note: str = ""


def is_done(stage: Stage) -> bool:
    """Return whether the stage's result exists, or (checkpoint, export) all evaluations that would use it are done.

    A report is done if no evaluation is newer.
    """
    if stage.kind == "annotate":
        return is_annotated(stage.settings) or atomic_dir.is_complete(Path(stage.shards))
    if stage.kind == "prepare":
        return are_shards_ready(stage.settings)
    if stage.kind == "report":
        study = StudyDirectory(Path(stage.settings.runs[0]))
        page = study.report / "index.html"
        if not page.is_file():
            return False
        written_at = page.stat().st_mtime
        results = [run.evaluation(name).results for run in study.runs() for name in run.evaluation_names()]
        return all(path.stat().st_mtime <= written_at for path in results if path.is_file())
    assert stage.run is not None
    if stage.kind == "evaluate":
        return is_evaluated(stage.settings)
    evaluations = (*stage.run.evaluations, *stage.run.dependent_evaluations)
    if evaluations and all(is_evaluated(settings) for settings in evaluations):
        return True
    return is_exported(stage.run.directory) or (stage.kind == "train" and is_trained(stage.run.directory))


def is_annotated(settings: AnnotateSettings) -> bool:
    """Return whether the annotations exist. Raises UserError if they were made with other settings."""
    path = AnnotationDirectory(Path(settings.output_dir)).result
    keys = (*_ANNOTATION_SETTINGS, *(("model",) if settings.model else ()))
    remedy = "another annotations_dir, or delete the result (the teacher's answers are kept beside it)"
    return _is_made(path, "annotations", settings, keys, remedy)


def are_shards_ready(settings: PrepareSettings) -> bool:
    """Return whether the shards exist. Raises UserError if they were made with other settings."""
    remedy = "another shards_dir, or delete the old shards and every run that used them"
    return _is_made(Path(settings.output_dir), "shards", settings, sorted(vars(settings)), remedy)


def _is_made(path: Path, kind: str, settings: Any, keys: Iterable[str], remedy: str) -> bool:
    """Return whether the artifact is complete. Raises UserError if one of `keys` in its recipe differs."""
    if not atomic_dir.is_complete(path):
        return False
    recipe = atomic_dir.read_manifest(path, kind)["facts"].get("recipe", {})
    for key in keys:
        if key in recipe and recipe[key] != getattr(settings, key):
            raise UserError(
                f"{path} holds {kind} with {key} {recipe[key]!r}, the study says {getattr(settings, key)!r}; "
                f"give the study {remedy}"
            )
    return True


def is_trained(run: RunDirectory) -> bool:
    """Return whether there is a complete checkpoint of the last step."""
    return any(
        atomic_dir.read_manifest(path, "checkpoint")["facts"].get("finished") is True
        for path in _complete_checkpoints(run)
    )


def is_exported(run: RunDirectory) -> bool:
    """Return whether there is a complete export of the last step."""
    complete = atomic_dir.is_complete(run.export)
    return complete and atomic_dir.read_manifest(run.export, "export")["facts"].get("finished") is True


def is_evaluated(settings: EvaluateSettings) -> bool:
    return EvaluationDirectory(Path(settings.output_dir)).results.is_file()


def has_work(run: RunDirectory) -> bool:
    """Return whether there is a complete checkpoint, an export or an evaluation."""
    return bool(_complete_checkpoints(run) or atomic_dir.is_complete(run.export) or run.evaluation_names())


def _complete_checkpoints(run: RunDirectory) -> list[Path]:
    paths = [run.checkpoint(step) for step in run.checkpoint_steps()]
    return [path for path in paths if atomic_dir.is_complete(path)]


def training_progress(settings: TrainSettings) -> Progress:
    """Return a training's progress from the end of its metrics.jsonl; the total is max_steps until the first step."""
    steps = last_steps(RunDirectory(Path(settings.output_dir)).metrics)
    last = steps[-1] if steps else {}
    step, total, loss = last.get("step", 0), last.get("total_steps", settings.max_steps), last.get("loss")
    note = f"loss {loss:.3f}" if isinstance(loss, (int, float)) else ""
    return Progress(min(step, total), total, note)


def annotation_progress(settings: AnnotateSettings) -> Progress:
    """Return the number of the teacher's answers; their total is not known in advance."""
    try:
        answers = AnnotationDirectory(Path(settings.output_dir)).responses.read_bytes().count(b"\n")
    except FileNotFoundError:
        answers = 0
    return Progress(answers, 0, "answers")


def final_loss(run: RunDirectory) -> float | None:
    """Return the mean loss of the last steps in the log, in nats per learned token; None without steps."""
    losses = [step.get("loss") for step in last_steps(run.metrics)[-_FINAL_LOSS_STEPS:]]
    numbers = [loss for loss in losses if isinstance(loss, (int, float)) and math.isfinite(loss)]
    return sum(numbers) / len(numbers) if numbers else None


def accuracy(settings: EvaluateSettings) -> str:
    """Return strict accuracy with its 95 % interval, "67.0% [61.5, 72.1]". Raises UserError for an unreadable file."""
    with _readable(EvaluationDirectory(Path(settings.output_dir)).results, "evaluate again") as path:
        strict = json.loads(path.read_text(encoding="utf-8"))["accuracy"]["strict"]
        return f"{strict['accuracy']:.1%} [{100 * strict['low']:.1f}, {100 * strict['high']:.1f}]"


def headlines(study: StudyDirectory) -> list[str]:
    """Return the report's headline for each problem set. Raises UserError if they cannot be read."""
    with _readable(study.report / "results.json", "make the report again") as path:
        return [str(line) for line in json.loads(path.read_text(encoding="utf-8"))["headlines"]]


@contextlib.contextmanager
def _readable(path: Path, remedy: str) -> Iterator[Path]:
    """Context manager that turns errors of a damaged file into a UserError."""
    try:
        yield path
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete the folder and {remedy}") from None


class EvaluationProgress:
    """Callable that counts finished problems (lines in the rank files), reading only lines added since its last call."""

    def __init__(self, settings: EvaluateSettings):
        self._rank_files = EvaluationDirectory(Path(settings.output_dir)).rank_files
        self._offsets: dict[Path, int] = {}
        self._done = 0
        facts = atomic_dir.read_manifest(Path(settings.shards), "shards")["facts"]
        self._total = facts["num_problems"]
        if settings.max_problems:
            self._total = min(self._total, settings.max_problems)

    def __call__(self) -> Progress:
        for path in self._rank_files.glob("*.jsonl") if self._rank_files.is_dir() else ():
            with open(path, "rb") as file:
                file.seek(self._offsets.get(path, 0))
                added = file.read()
            self._offsets[path] = self._offsets.get(path, 0) + len(added)
            self._done += added.count(b"\n")
        return Progress(min(self._done, self._total), self._total)


def last_steps(metrics: Path) -> list[dict[str, Any]]:
    """Return the records of the last steps, ascending; after a resume, only the last record of a repeated step."""
    steps: dict[int, dict[str, Any]] = {}
    for _, record in read_json_lines(metrics, _TAIL_BYTES):
        step = record.get("step") if record else None
        if record and type(step) is int and "evaluation" not in record:
            for undone in [known for known in steps if known >= step]:  # by a resume at an earlier checkpoint
                del steps[undone]
            steps[step] = record
    return list(steps.values())
