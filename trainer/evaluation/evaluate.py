"""Run an evaluation and write predictions.jsonl and results.json."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trainer
from trainer.errors import UserError
from trainer.evaluation import model_reference, rank_files
from trainer.evaluation.backends.choice import TRANSFORMERS
from trainer.evaluation.decoding import FEW_SHOT
from trainer.evaluation.job import EvaluationJob, job_fingerprint, resolve_job, write_settings
from trainer.evaluation.pipeline import Pipeline, RoleModel, predictions
from trainer.evaluation.score import accuracy_text, summarise
from trainer.evaluation.work_queue import COUNTER_NAMES, exhaust_queue
from trainer.runtime import distributed, startup, terminal
from trainer.runtime.shared_counter import SharedCounter, shared_counter
from trainer.settings import EvaluateSettings
from trainer.storage import atomic_dir

RESULTS_FORMAT = 1
_PROGRESS_INTERVAL_SECONDS = 0.2


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Collective. Evaluate a model, or a decomposer and a solver. Return the content of results.json on every rank.

    An earlier evaluation with the same settings is resumed if it was interrupted, and not repeated if it has finished. Raises
    UserError on every rank if models and shards are incompatible, if the directory holds results of other settings and
    `overwrite` is not set, or if the predictions do not contain every problem exactly once.
    """
    with rank_files.any_error_on_all_ranks():
        job = resolve_job(settings)
        ids = [job.shards.problem(index).id for index in range(job.num_problems)]
    model_facts = {role: model.facts for role, model in job.models.items()}
    distributed.assert_same_on_all_ranks(
        "evaluation", {**job.fingerprint_fields({}), "models": model_facts, "code": trainer.__version__}
    )
    digests, earlier = _on_rank_0(lambda: _earlier_results(job, settings.overwrite))
    if earlier is not None:
        terminal.info(f"already evaluated: {accuracy_text(earlier['accuracy'])}; {job.directory.results}")
        return earlier
    for warning in job.warnings():
        terminal.warning(warning)
    terminal.info(job.describe())
    _on_rank_0(lambda: _prepare(job, settings))
    with rank_files.any_error_on_all_ranks():
        pipeline = _load_pipeline(job)
    startup.freeze_gc()

    fields = job.fingerprint_fields(digests)
    fingerprint = job_fingerprint(fields)
    files = _on_rank_0(lambda: rank_files.list_rank_files(job.directory.rank_files, fingerprint))
    # Predictions of interrupted runs of this job: problem id -> whether the prediction is correct.
    solved: dict[str, bool] = _on_rank_0(
        lambda: {line["id"]: line["correct_strict"] for line in rank_files.read_rank_files(files)}
    )
    if solved:
        terminal.info(f"{len(solved)} of {len(ids)} problems were solved before; resuming")
    remaining = [index for index, problem_id in enumerate(ids) if problem_id not in solved]
    if remaining:
        pipeline.backends = _on_rank_0(lambda: pipeline.choose_backends(range(len(ids)), settings.backend))
        for role in job.models:
            choice = pipeline.backend_of(role)
            if choice.name == TRANSFORMERS:
                terminal.info(f"{role}: {choice.describe()}")
    start = time.monotonic()
    path = _solve(job, pipeline, remaining, fingerprint, solved)
    new_files, seconds = zip(*distributed.gather_objects((path, time.monotonic() - start)), strict=True)

    num_parameters = {
        role: model.facts.get("num_parameters", pipeline.role_models[role].model.num_parameters())
        for role, model in job.models.items()
    }
    description = {
        **job.result_fields(num_parameters, digests),
        "seconds": round(max(seconds), 3),
        "world_size": distributed.environment().world_size,
        "backends": {role: pipeline.backend_of(role).to_dict() for role in job.models},
        **fields,
        "identity": fingerprint,
    }
    results = _on_rank_0(lambda: _write_results(job, [*files, *new_files], ids, description))
    since_resumed = " since it was resumed" if solved else ""
    terminal.info(
        f"{accuracy_text(results['accuracy'])}; {results['generated_tokens']:,} generated tokens; "
        f"{terminal.duration_text(results['seconds'])}{since_resumed}; {job.directory.results}"
    )
    return results


def _prepare(job: EvaluationJob, settings: EvaluateSettings) -> None:
    for role in job.first_roles.values():
        model_reference.convert_checkpoint(job.models[role], job.export_scratch_dir(job.models[role]))
    if job.is_pair or job.decoding.mode == FEW_SHOT:
        write_settings(settings, job.directory)


def _load_pipeline(job: EvaluationJob) -> Pipeline:
    """Return a pipeline of the job's models on this rank's device. A model with several roles is loaded once."""
    loaded = {
        name: model_reference.load_model_and_tokenizer(
            job.models[role], job.shards, job.dtype, job.export_scratch_dir(job.models[role])
        )
        for name, role in job.first_roles.items()
    }
    role_models = {
        role: RoleModel(loaded[model.name][0], model.method, model.name) for role, model in job.models.items()
    }
    tokenizer = next(iter(loaded.values()))[1]
    return Pipeline(role_models, tokenizer, job.shards, job.decoding, job.exemplars)


def _solve(
    job: EvaluationJob, pipeline: Pipeline, indices: list[int], fingerprint: str, solved: dict[str, bool]
) -> Path:
    """Solve the problems `indices` with all ranks (collective). Return the file of this rank's predictions."""
    with rank_files.any_error_on_all_ranks():
        file = rank_files.RankFile(job.directory.rank_files, fingerprint)
    with (
        file,
        terminal.progress_bar("solve", job.num_problems, len(solved)) as bar,
        shared_counter(COUNTER_NAMES) as counter,
    ):
        progress = _SharedProgress(bar, counter, solved)
        with rank_files.capture_error() as messages:
            for prediction in predictions(pipeline, indices, counter):
                file.append(prediction)
                progress.add(prediction["correct_strict"])
        if messages:
            exhaust_queue(counter)
    distributed.raise_on_all_ranks("".join(messages))
    return file.path


class _SharedProgress:
    """Progress bar over the problems of all ranks. A rank adds its counts to the shared counter at most every 0.2 s."""

    def __init__(self, bar: terminal.ProgressBar, counter: SharedCounter, solved: dict[str, bool]) -> None:
        self._bar, self._counter = bar, counter
        self._num_resumed, self._num_resumed_correct = len(solved), sum(solved.values())
        self._unreported: list[bool] = []  # correctness of each prediction since the counter was last updated
        self._last = time.monotonic()

    def add(self, correct: bool) -> None:
        self._unreported.append(correct)
        if time.monotonic() - self._last < _PROGRESS_INTERVAL_SECONDS:
            return
        new, new_correct = len(self._unreported), sum(self._unreported)
        num_solved = self._num_resumed + self._counter.add("solved", new) + new
        num_correct = self._num_resumed_correct + self._counter.add("correct", new_correct) + new_correct
        self._unreported.clear()
        self._last = time.monotonic()
        self._bar.update(num_solved, f"strict {100 * num_correct / num_solved:.1f} %")


def _on_rank_0(function: Callable[[], Any]) -> Any:
    """Call `function` on rank 0 and return its result on every rank; an error is raised on every rank (collective)."""
    value = None
    with rank_files.any_error_on_all_ranks():
        if distributed.is_main_process():
            value = function()
    return distributed.broadcast_object(value)


def _earlier_results(job: EvaluationJob, overwrite: bool) -> tuple[dict[str, str], dict[str, Any] | None]:
    """Return {role: content digest of the role's model}, and the earlier results of this job, or None if there are none.

    Raises UserError if results.json is damaged, or if it holds results of other settings and `overwrite` is False.
    """
    by_name = {
        name: model_reference.content_digest(job.models[role]) for name, role in job.first_roles.items()
    }
    digests = {role: by_name[model.name] for role, model in job.models.items()}
    fields = job.fingerprint_fields(digests)
    path = job.directory.results
    if not path.is_file():
        return digests, None
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        is_same = earlier["identity"] == job_fingerprint(fields)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the result of an evaluation; give another output_dir") from None
    if is_same or overwrite:
        return digests, earlier if is_same else None
    changed = ", ".join(
        f"{name}: {earlier.get(name)!r} there, {value!r} now"
        for name, value in fields.items()
        if earlier.get(name) != value
    )
    raise UserError(
        f"{path} is of an evaluation with other settings ({changed}); give another output_dir, or --overwrite"
    )


def _write_results(
    job: EvaluationJob, files: list[Path], ids: list[str], description: dict[str, Any]
) -> dict[str, Any]:
    """Merge the rank files into predictions.jsonl, write results.json, remove temporary files, and return the results."""
    merged = rank_files.merge_predictions(rank_files.read_rank_files(files), ids)
    results = {"format": RESULTS_FORMAT, **description, **summarise(merged)}
    directory = job.directory
    directory.results.unlink(missing_ok=True)  # old results must not lie beside new predictions
    lines = [json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in merged]
    atomic_dir.write_text(directory.predictions, "".join(lines))
    atomic_dir.write_text(directory.results, json.dumps(results, indent=1) + "\n")
    for model in job.models.values():
        shutil.rmtree(job.export_scratch_dir(model), ignore_errors=True)
    rank_files.remove_rank_files(files)
    return results
