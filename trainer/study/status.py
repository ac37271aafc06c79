"""State of a study's stages. The state is derived from files alone, so that a killed study can be continued."""

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
from trainer.teacher.settings import RESULT_SETTINGS, SAMPLING_SETTINGS, AnnotateSettings

_TAIL_BYTES = 64 << 10
_FINAL_LOSS_STEPS = 20  # final loss: mean over the last 20 steps, because the loss of one step is too noisy


@dataclass(frozen=True)
class Progress:
    """Progress of a stage: `done` of `total` steps or problems (total 0: unknown), and a short note such as the loss."""

    done: int
    total: int
    note: str = ""


def is_done(stage: Stage) -> bool:
    """Return True if the result of the stage exists.

    Annotation is also done if the shards exist. Training is also done if the export exists. Training and conversion are
    also done if all evaluations of the model are done. A report is not done if newer evaluation results exist.
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
    """Return True if the annotations exist. Raises UserError if they were made with other settings."""
    path = AnnotationDirectory(Path(settings.output_dir)).result
    keys = (*RESULT_SETTINGS, *SAMPLING_SETTINGS, *(("model",) if settings.model else ()))
    remedy = "another annotations_dir, or delete the result (the teacher's answers are kept beside it)"
    return _is_made(path, "annotations", settings, keys, remedy)


def are_shards_ready(settings: PrepareSettings) -> bool:
    """Return True if the shards exist. Raises UserError if they were made with other settings."""
    remedy = "another shards_dir, or delete the old shards and every run that used them"
    return _is_made(Path(settings.output_dir), "shards", settings, sorted(vars(settings)), remedy)


def _is_made(path: Path, kind: str, settings: Any, keys: Iterable[str], remedy: str) -> bool:
    """Return True if the artifact is complete. Raises UserError if a recorded setting in `keys` differs from `settings`."""
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
    """Return True if there is a complete checkpoint of the last step."""
    return any(_is_of_last_step(run.checkpoint(step), "checkpoint") for step in run.checkpoint_steps())


def is_exported(run: RunDirectory) -> bool:
    """Return True if there is a complete export of the last step."""
    return _is_of_last_step(run.export, "export")


def _is_of_last_step(path: Path, kind: str) -> bool:
    complete = atomic_dir.is_complete(path)
    return complete and atomic_dir.read_manifest(path, kind)["facts"].get("finished") is True


def is_evaluated(settings: EvaluateSettings) -> bool:
    return EvaluationDirectory(Path(settings.output_dir)).results.is_file()


def has_work(run: RunDirectory) -> bool:
    """Return True if there is a complete checkpoint, a complete export or an evaluation's folder."""
    paths = [run.export, *map(run.checkpoint, run.checkpoint_steps())]
    return any(map(atomic_dir.is_complete, paths)) or bool(run.evaluation_names())


def training_progress(settings: TrainSettings) -> Progress:
    """Return a training's progress from the end of metrics.jsonl. Before the first step, the total is `max_steps`."""
    steps = last_steps(RunDirectory(Path(settings.output_dir)).metrics)
    last = steps[-1] if steps else {}
    step, total, loss = last.get("step", 0), last.get("total_steps", settings.max_steps), last.get("loss")
    note = f"loss {loss:.3f}" if isinstance(loss, (int, float)) else ""
    return Progress(min(step, total), total, note)


def annotation_progress(settings: AnnotateSettings) -> Progress:
    """Return how many answers the teacher has written so far. The total is 0, because it is not known in advance."""
    answers = 0
    with contextlib.suppress(FileNotFoundError):
        answers = AnnotationDirectory(Path(settings.output_dir)).responses.read_bytes().count(b"\n")
    return Progress(answers, 0, "answers")


def final_loss(run: RunDirectory) -> float | None:
    """Return the mean loss of the last steps in metrics.jsonl, in nats per target token; None if no loss is finite."""
    losses = [step.get("loss") for step in last_steps(run.metrics)[-_FINAL_LOSS_STEPS:]]
    numbers = [loss for loss in losses if isinstance(loss, (int, float)) and math.isfinite(loss)]
    return sum(numbers) / len(numbers) if numbers else None


def accuracy(settings: EvaluateSettings) -> str:
    """Return strict accuracy and 95 % interval, e.g. "67.0% [61.5, 72.1]". Raises UserError if results.json is damaged."""
    with _read_json(EvaluationDirectory(Path(settings.output_dir)).results, "evaluate again") as results:
        strict = results["accuracy"]["strict"]
        return f"{strict['accuracy']:.1%} [{100 * strict['low']:.1f}, {100 * strict['high']:.1f}]"


def headlines(study: StudyDirectory) -> list[str]:
    """Return the report's headline for each problem set. Raises UserError if the report's results.json is damaged."""
    with _read_json(study.report / "results.json", "make the report again") as results:
        return [str(line) for line in results["headlines"]]


@contextlib.contextmanager
def _read_json(path: Path, remedy: str) -> Iterator[Any]:
    """Context manager that yields the content of a JSON file. Raises UserError if reading or using the content fails."""
    try:
        yield json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete the folder and {remedy}") from None


class EvaluationProgress:
    """Callable that counts finished problems, i.e. lines in the rank files. Each call reads only new lines."""

    def __init__(self, settings: EvaluateSettings):
        self._rank_files = EvaluationDirectory(Path(settings.output_dir)).rank_files
        self._offsets: dict[Path, int] = {}
        self._done = 0
        num_problems = atomic_dir.read_manifest(Path(settings.shards), "shards")["facts"]["num_problems"]
        self._total = min(settings.max_problems or num_problems, num_problems)

    def __call__(self) -> Progress:
        for path in self._rank_files.glob("*.jsonl") if self._rank_files.is_dir() else ():
            with open(path, "rb") as file:
                file.seek(self._offsets.get(path, 0))
                added = file.read()
            self._offsets[path] = self._offsets.get(path, 0) + len(added)
            self._done += added.count(b"\n")
        return Progress(min(self._done, self._total), self._total)


def last_steps(metrics: Path) -> list[dict[str, Any]]:
    """Return the records of the last steps (last 64 KiB of the file) in order. Of a repeated step, return the last record."""
    steps: list[dict[str, Any]] = []
    for _, record in read_json_lines(metrics, _TAIL_BYTES):
        if record and type(record.get("step")) is int and "evaluation" not in record:
            steps = [earlier for earlier in steps if earlier["step"] < record["step"]] + [record]
    return steps
