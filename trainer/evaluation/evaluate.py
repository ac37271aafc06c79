"""Every problem of a shard set is answered exactly once: predictions.jsonl and, written last, results.json."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trainer
from trainer.errors import UserError
from trainer.evaluation import job, job_description, paths, rank_files
from trainer.evaluation import model_reference as students
from trainer.evaluation.backends.choice import TRANSFORMERS
from trainer.evaluation.decoding import FEW_SHOT
from trainer.evaluation.job import EvaluationJob
from trainer.evaluation.pipeline import Pipeline, RoleModel
from trainer.evaluation.predict import predictions
from trainer.evaluation.score import accuracy_text, summarise
from trainer.evaluation.work_queue import CELLS, exhaust_queue
from trainer.runtime import distributed, startup, terminal
from trainer.runtime.shared_counter import Counter, shared_counter
from trainer.settings import EvaluateSettings
from trainer.storage import atomic_dir

FORMAT = 1
_TELL_EVERY_SECONDS = 0.2


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Collective. Evaluate a student or several together; returns what is in results.json, on every rank.

    What an earlier, interrupted evaluation with the same settings has solved is not solved again; finished results
    are returned as they are. Raises UserError, on every rank, for students and shards that do not fit, for results
    of other settings without `overwrite`, and for predictions that are not every problem exactly once.
    """
    with rank_files.errors_on_all_ranks():
        work = job.resolve_job(settings)
        ids = [work.shards.problem(index).id for index in range(work.num_problems)]
    facts = {part: student.facts for part, student in work.models.items()}
    distributed.assert_same_on_all_ranks(
        "evaluation", {**work.fingerprint_fields({}), "students": facts, "code": trainer.__version__}
    )
    digests, earlier = _on_rank_0(lambda: _earlier_results(work, settings.overwrite))
    if earlier is not None:
        terminal.info(f"already evaluated: {accuracy_text(earlier['accuracy'])}; {work.directory.results}")
        return earlier
    for warning in job_description.warnings(work):
        terminal.warning(warning)
    terminal.info(job_description.job_text(work))
    _on_rank_0(lambda: _prepare(work, settings))
    with rank_files.errors_on_all_ranks():
        cast = _load_pipeline(work)
    startup.freeze_gc()

    recipe = work.fingerprint_fields(digests)
    identity = job.digest(recipe)
    parts, solved = _on_rank_0(lambda: _solved_before(work, identity))
    if solved:
        terminal.info(f"{len(solved)} of {len(ids)} problems were solved before; going on")
    left = [index for index, problem_id in enumerate(ids) if problem_id not in solved]
    if left:
        _choose_backends(cast, range(len(ids)), settings.backend)
    start = time.monotonic()
    path = _solve_into_part(work, cast, left, identity, solved)
    finished = distributed.gather_objects((path, time.monotonic() - start))

    about = {
        **job_description.job_fields(work, _sizes(work, cast), digests),
        "seconds": round(max(seconds for _, seconds in finished), 3),
        "world_size": distributed.environment().world_size,
        "backends": {part: cast.backend_of(part).record() for part in work.models},
        **recipe,
        "identity": identity,
    }
    parts += [path for path, _ in finished]
    results = _on_rank_0(lambda: _write(work, parts, ids, about))
    terminal.info(
        f"{accuracy_text(results['accuracy'])}; {results['generated_tokens']} tokens in "
        f"{terminal.duration(results['seconds'])}; {work.directory.results}"
    )
    return results


def _prepare(work: EvaluationJob, settings: EvaluateSettings) -> None:
    """What rank 0 writes before anybody loads a model."""
    for part in work.first_roles.values():
        students.convert_checkpoint(work.models[part], work.scratch(work.models[part]))
    if work.is_pair or work.decoding.mode == FEW_SHOT:
        paths.write_settings(settings, work.directory)


def _load_pipeline(work: EvaluationJob) -> Pipeline:
    """Every student's weights once on this rank's device, whatever parts it plays."""
    opened = {
        name: students.load_model_and_tokenizer(
            work.models[part], work.shards, work.dtype, work.scratch(work.models[part])
        )
        for name, part in work.first_roles.items()
    }
    actors = {
        part: RoleModel(opened[student.name][0], student.method, student.name)
        for part, student in work.models.items()
    }
    tokenizer = next(iter(opened.values()))[1]
    return Pipeline(actors, tokenizer, work.shards, work.decoding, work.exemplars)


def _choose_backends(cast: Pipeline, indices: Sequence[int], requested: str) -> None:
    """Collective. Rank 0 checks, before the first answer, how each model is decoded; all ranks decode alike."""
    cast.backends = _on_rank_0(lambda: cast.choose_backends(indices, requested))
    told = {part: cast.backend_of(part) for part in cast.role_models}
    for part, choice in told.items():
        if choice.name == TRANSFORMERS:
            terminal.info(f"{part}: {choice.text()}")


def _sizes(work: EvaluationJob, cast: Pipeline) -> dict[str, int]:
    return {
        part: student.facts.get("num_parameters", cast.role_models[part].model.num_parameters())
        for part, student in work.models.items()
    }


def _solve(cast: Pipeline, indices: Sequence[int], keep: Callable[[dict[str, Any], Counter], None]) -> None:
    """Collective. Solve `indices` with all ranks; `keep` gets each prediction of this rank."""
    attempt = rank_files.CapturedError()
    with shared_counter(CELLS) as counter:
        with attempt:
            for prediction in predictions(cast, indices, counter):
                keep(prediction, counter)
        if attempt.error:
            exhaust_queue(counter)
    attempt.raise_on_all_ranks()


def _solve_into_part(
    work: EvaluationJob, cast: Pipeline, left: list[int], identity: str, solved: Mapping[str, bool]
) -> Path:
    """Collective. Solve what is left; every prediction is on disk at once, in this rank's part file."""
    with rank_files.errors_on_all_ranks():
        part = rank_files.RankFile(work.directory.rank_files, identity)
    with part, terminal.progress("solve", work.num_problems, len(solved)) as bar:
        tell = _ProgressReport(bar, len(solved), sum(solved.values()))

        def keep(prediction: dict[str, Any], counter: Counter) -> None:
            part.append(prediction)
            tell.one_more(prediction["correct_strict"], counter)

        _solve(cast, left, keep)
    return part.path


class _ProgressReport:
    """Tells the other ranks, and rank 0 its user, how far all ranks together are."""

    def __init__(self, bar: terminal.ProgressBar, solved: int, correct: int) -> None:
        self._bar = bar
        self._before = (solved, correct)
        self._untold = [0, 0]
        self._last = time.monotonic()

    def one_more(self, correct: bool, counter: Counter) -> None:
        self._untold = [self._untold[0] + 1, self._untold[1] + correct]
        if time.monotonic() - self._last < _TELL_EVERY_SECONDS:
            return
        cells = zip(("solved", "correct"), self._untold, self._before, strict=True)
        all_solved, all_correct = (counter.add(cell, more) + more + before for cell, more, before in cells)
        self._untold = [0, 0]
        self._last = time.monotonic()
        self._bar.update(all_solved, f"strict {100 * all_correct / all_solved:.1f} %")


def _on_rank_0(function: Callable[[], Any]) -> Any:
    """Collective. What rank 0's `function` returns, on every rank; if it fails, every rank raises."""
    value = None
    with rank_files.errors_on_all_ranks():
        if distributed.is_main_process():
            value = function()
    return distributed.broadcast_object(value)


def _earlier_results(work: EvaluationJob, overwrite: bool) -> tuple[dict[str, str], dict[str, Any] | None]:
    """The students' digests by part, and the results of this evaluation if they are there already."""
    once = {name: students.content_digest(work.models[part]) for name, part in work.first_roles.items()}
    digests = {part: once[student.name] for part, student in work.models.items()}
    recipe = work.fingerprint_fields(digests)
    path = work.directory.results
    if not path.is_file():
        return digests, None
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        same = earlier["identity"] == job.digest(recipe)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the result of an evaluation; give another output_dir") from None
    if same or overwrite:
        return digests, earlier if same else None
    changed = ", ".join(
        f"{name}: {earlier.get(name)!r} there, {value!r} now"
        for name, value in recipe.items()
        if earlier.get(name) != value
    )
    raise UserError(
        f"{path} is of an evaluation with other settings ({changed}); give another output_dir, or --overwrite"
    )


def _solved_before(work: EvaluationJob, identity: str) -> tuple[list[Path], dict[str, bool]]:
    """Part files of earlier evaluations of the same making, and the ids in them with whether they are correct."""
    parts = rank_files.rank_files(work.directory.rank_files, identity)
    solved = [prediction for part in parts for prediction in rank_files.read_rank_file(part)]
    return parts, {prediction["id"]: prediction["correct_strict"] for prediction in solved}


def _write(work: EvaluationJob, parts: list[Path], ids: list[str], about: dict[str, Any]) -> dict[str, Any]:
    """The union of all part files -> predictions.jsonl -> results.json; then the parts are no longer needed."""
    union = rank_files.merge_predictions(
        (prediction for part in parts for prediction in rank_files.read_rank_file(part)), ids
    )
    results = {"format": FORMAT, **about, **summarise(union)}
    directory = work.directory
    directory.results.unlink(missing_ok=True)  # old results never stand beside new predictions
    atomic_dir.write_text(
        directory.predictions, "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in union)
    )
    atomic_dir.write_text(directory.results, json.dumps(results, indent=1) + "\n")
    for student in work.models.values():
        shutil.rmtree(work.scratch(student), ignore_errors=True)
    rank_files.remove_rank_files(parts)
    return results
