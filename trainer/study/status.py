"""What is done, read from disk and from nowhere else: a study can be killed at any instant and go on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.settings import EvaluateSettings, PrepareSettings, TrainSettings
from trainer.storage import atomic_dir
from trainer.storage.run_directory import (
    AnnotationDirectory,
    EvaluationDirectory,
    RunDirectory,
    StudyDirectory,
)
from trainer.study.stages import Stage
from trainer.teacher.settings import AnnotateSettings

_TAIL_BYTES = 64 << 10
# What an annotation says about itself in the words of its settings.
_TEACHING = (
    *("data", "split", "seed", "max_problems", "style", "gold_hint", "with_facts", "num_samples", "keep_all"),
    *("min_steps", "max_steps", "require_annotations", "decontaminate_ngram"),
    *("temperature", "top_p", "max_new_tokens"),
)
_STEPS_OF_FINAL_LOSS = 20  # a single step is too noisy to look at


@dataclass(frozen=True)
class Progress:
    """`done` of `total`, and how it goes in a few words."""

    done: int
    total: int
    note: str = ""


def is_done(stage: Stage) -> bool:
    """Whether the stage's result is there. A student that nobody will ask any more needs neither checkpoint nor export."""
    if stage.kind == "annotate":
        return is_annotated(stage.settings) or atomic_dir.is_complete(Path(stage.shards))
    if stage.kind == "prepare":
        return are_shards_ready(stage.settings)
    if stage.kind == "report":
        return _report_is_fresh(StudyDirectory(Path(stage.settings.runs[0])))
    assert stage.run is not None
    if stage.kind == "evaluate":
        return is_evaluated(stage.settings)
    asked = (*stage.run.evaluations, *stage.run.serves)
    if asked and all(is_evaluated(settings) for settings in asked):
        return True
    if is_exported(stage.run.directory):
        return True
    return stage.kind == "train" and is_trained(stage.run.directory)


def is_annotated(settings: AnnotateSettings) -> bool:
    """Whether the teacher's steps are there. Raises UserError if they were made with other settings."""
    path = AnnotationDirectory(Path(settings.output_dir)).result
    if not atomic_dir.is_complete(path):
        return False
    recipe = atomic_dir.read_manifest(path, "annotations")["facts"].get("recipe", {})
    compared = [key for key in _TEACHING if key in recipe]
    if settings.model:
        compared += ["model"]
    for key in compared:
        if recipe[key] != getattr(settings, key):
            raise UserError(
                f"{path} holds annotations with {key} {recipe[key]!r}, the study says {getattr(settings, key)!r}; give "
                "the study an annotations_dir of its own, or delete the result (the teacher's answers are kept beside it)"
            )
    return True


def are_shards_ready(settings: PrepareSettings) -> bool:
    """Whether the shards are there. Raises UserError if they were made with other settings."""
    path = Path(settings.output_dir)
    if not atomic_dir.is_complete(path):
        return False
    recipe = atomic_dir.read_manifest(path, "shards")["facts"].get("recipe", {})
    for key in sorted(recipe.keys() & vars(settings).keys()):
        if recipe[key] != getattr(settings, key):
            raise UserError(
                f"{path} holds shards with {key} {recipe[key]!r}, the study says {getattr(settings, key)!r}; "
                "give the study a shards_dir of its own, or delete the old shards and every run that used them"
            )
    return True


def is_trained(run: RunDirectory) -> bool:
    """Whether the newest finished checkpoint is of the last step."""
    return any(
        atomic_dir.read_manifest(run.checkpoint(step), "checkpoint")["facts"].get("finished") is True
        for step in run.checkpoint_steps()
        if atomic_dir.is_complete(run.checkpoint(step))
    )


def is_exported(run: RunDirectory) -> bool:
    """Whether the export is there and of the last step."""
    finished = atomic_dir.is_complete(run.export)
    return finished and atomic_dir.read_manifest(run.export, "export")["facts"].get("finished") is True


def is_evaluated(settings: EvaluateSettings) -> bool:
    return EvaluationDirectory(Path(settings.output_dir)).results.is_file()


def has_work(run: RunDirectory) -> bool:
    """Whether anything of value is there: a finished checkpoint, an export or an evaluation."""
    checkpoints = any(atomic_dir.is_complete(run.checkpoint(step)) for step in run.checkpoint_steps())
    return checkpoints or atomic_dir.is_complete(run.export) or bool(run.evaluation_names())


def training_progress(settings: TrainSettings) -> Progress:
    """Where a training is, from the end of its metrics.jsonl. The total is 0 (unknown) until the first step."""
    steps = last_steps(RunDirectory(Path(settings.output_dir)).metrics)
    last = steps[-1] if steps else {}
    step, total, loss = last.get("step", 0), last.get("total_steps", settings.max_steps), last.get("loss")
    note = f"loss {loss:.3f}" if isinstance(loss, (int, float)) else ""
    return Progress(min(step, total), total, note)


def annotation_progress(settings: AnnotateSettings) -> Progress:
    """How many answers the teacher has given; how many there will be depends on them."""
    try:
        answers = AnnotationDirectory(Path(settings.output_dir)).responses.read_bytes().count(b"\n")
    except FileNotFoundError:
        answers = 0
    return Progress(answers, 0, "answers")


def final_loss(run: RunDirectory) -> float | None:
    """Mean loss of the last steps in the log, in nats per learned token."""
    losses = [step.get("loss") for step in last_steps(run.metrics)[-_STEPS_OF_FINAL_LOSS:]]
    numbers = [loss for loss in losses if isinstance(loss, (int, float)) and math.isfinite(loss)]
    return sum(numbers) / len(numbers) if numbers else None


def accuracy(settings: EvaluateSettings) -> str:
    """`67.0 % [61.5, 72.1]`: strict accuracy with its 95 % interval. Raises UserError for an unreadable file."""
    path = EvaluationDirectory(Path(settings.output_dir)).results
    try:
        strict = json.loads(path.read_text(encoding="utf-8"))["accuracy"]["strict"]
        return f"{strict['accuracy']:.1%} [{100 * strict['low']:.1f}, {100 * strict['high']:.1f}]"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete the folder and evaluate again") from None


def headlines(study: StudyDirectory) -> list[str]:
    """The findings, in the report's words, one for each set of problems. Raises UserError if they cannot be read."""
    path = study.report / "results.json"
    try:
        return [str(line) for line in json.loads(path.read_text(encoding="utf-8"))["headlines"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete the folder and make the report again") from None


class EvaluationProgress:
    """Counts finished problems, the lines of the ranks' files, reading only what is new since the last look."""

    def __init__(self, settings: EvaluateSettings):
        self._parts = EvaluationDirectory(Path(settings.output_dir)).rank_files
        self._offsets: dict[Path, int] = {}
        self._done = 0
        facts = atomic_dir.read_manifest(Path(settings.shards), "shards")["facts"]
        self._total = facts["num_problems"]
        if settings.max_problems:
            self._total = min(self._total, settings.max_problems)

    def __call__(self) -> Progress:
        for path in self._parts.glob("*.jsonl") if self._parts.is_dir() else ():
            with open(path, "rb") as file:
                file.seek(self._offsets.get(path, 0))
                new = file.read()
            self._offsets[path] = self._offsets.get(path, 0) + len(new)
            self._done += new.count(b"\n")
        return Progress(min(self._done, self._total), self._total)


def last_steps(metrics: Path) -> list[dict[str, Any]]:
    """Records of the last steps, ascending; of a step that was done twice (a resume) the last one counts."""
    try:
        with open(metrics, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    steps: dict[int, dict[str, Any]] = {}
    for record in _records(lines):
        step = record["step"]
        for later in [
            known for known in steps if known >= step
        ]:  # undone by a resume at an earlier checkpoint
            del steps[later]
        steps[step] = record
    return list(steps.values())


def _records(lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the first line is cut by the tail, the last one perhaps by a kill
            continue
        if isinstance(record, dict) and type(record.get("step")) is int and "evaluation" not in record:
            yield record


def _report_is_fresh(study: StudyDirectory) -> bool:
    """Whether a report is there and no evaluation is newer."""
    page = study.report / "index.html"
    results = [r.evaluation(name).results for r in study.runs() for name in r.evaluation_names()]
    made = page.stat().st_mtime if page.is_file() else 0.0
    return made > 0 and all(path.stat().st_mtime <= made for path in results if path.is_file())
