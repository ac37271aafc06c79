"""Annotate problems with a teacher: read data, send the unanswered requests, filter responses, publish the result."""

import contextlib
import json
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.runtime import directory_lock, terminal
from trainer.storage import atomic_dir
from trainer.storage.manifest import AnnotationFacts
from trainer.storage.run_directory import AnnotationDirectory
from trainer.teacher import result
from trainer.teacher.job import AnnotationJob, prepare_job
from trainer.teacher.responses import ResponseLog
from trainer.teacher.settings import AnnotateSettings

_CHARACTERS_PER_TOKEN = 4  # approximately, in English text


def annotate(settings: AnnotateSettings) -> int:
    """Annotate the problems, write `<output_dir>/result`, and return the number of kept samples.

    Responses of earlier runs, even of killed runs, are reused. Raises UserError if the input is invalid, if another process
    uses `output_dir`, if the endpoint does not answer, or if `output_dir` has a result of other settings and `overwrite` is
    False.
    """
    directory = AnnotationDirectory(Path(settings.output_dir))
    with directory_lock.locked(directory.lock):
        job = _prepare(settings)
        if _is_up_to_date(directory.result, job):
            summary = _summary(directory.result)
            terminal.info(result.table(summary))
            terminal.info(f"{directory.result}: already annotated")
            return int(summary["samples"]["kept"])
        with contextlib.closing(ResponseLog(directory.responses, directory.corrupt_lines)) as log:
            _query(job, log)
            return _publish(directory.result, job, log)


def print_dry_run(settings: AnnotateSettings) -> None:
    """Print the number of requests, the maximum cost and one prompt. Sends nothing and writes nothing."""
    directory = AnnotationDirectory(Path(settings.output_dir))
    job = _prepare(settings)
    log = ResponseLog(directory.responses, directory.corrupt_lines, read_only=True)
    queues = job.queues(log)
    missing = [request for queue in queues for request in queue if log.get(request.key) is None]
    num_least, num_most = len(queues), len(missing)
    prompt_tokens = sum(len(request.prompt) for request in missing) / _CHARACTERS_PER_TOKEN
    terminal.info(
        f"{len(job.problems)} problems to annotate; left out: {len(job.contaminated)} like test questions, "
        f"{len(job.bad_records)} bad records"
    )
    num_sent = f"{num_most}" if num_least == num_most else f"{num_least} to {num_most}"
    num_requests = sum(map(len, job.requests.values()))
    terminal.info(
        f"{num_requests} requests at most, {job.num_answered(log)} of them already answered; a run sends {num_sent}"
    )
    completion_tokens = num_most * settings.max_new_tokens
    terminal.info(f"about {prompt_tokens:,.0f} prompt and at most {completion_tokens:,} completion tokens")
    cost = result.cost_of(prompt_tokens, completion_tokens, settings)
    if cost is not None:
        terminal.info(f"cost at most about {cost:.2f}")
    first = job.problems[0]
    terminal.info(f"the prompt for {first.id}:\n\n{job.requests[first.id][0].prompt}\n")


def _prepare(settings: AnnotateSettings) -> AnnotationJob:
    if settings.base_url:
        from trainer.teacher.endpoint import check_url

        check_url(settings.base_url)
        return prepare_job(settings)
    from trainer.evaluation import model_reference

    reference = model_reference.find_model(settings.model_name_or_path)
    return prepare_job(settings, model_reference.content_digest(reference))


def _query(job: AnnotationJob, log: ResponseLog) -> None:
    queues = job.queues(log)
    terminal.info(
        f"{len(job.problems)} problems, {job.num_answered(log)} responses in the log; querying {job.teacher['model']} "
        f"for {len(queues)} {'samples' if job.settings.keep_all else 'problems'}"
    )
    if queues and job.settings.base_url:
        from trainer.teacher.endpoint_queries import query_endpoint

        query_endpoint(job, queues, log)
    elif queues:
        from trainer.teacher.local_model import query_local_model

        query_local_model(job, queues, log)


def _publish(final: Path, job: AnnotationJob, log: ResponseLog) -> int:
    """Write the result, print a summary, and return the number of kept samples."""
    results = list(result.problem_results(job, log))
    numbers = result.summarise(job, results, log)
    facts: AnnotationFacts = {
        "recipe": job.fingerprint_fields,
        "teacher": job.teacher,
        "gold_hint": job.settings.gold_hint,
        "endpoint": job.settings.base_url,
        "summary": numbers,
    }
    with atomic_dir.atomic_directory(final, result.KIND, facts, atomic_dir.is_complete(final)) as staging:
        result.write(staging, job, results, numbers)
    terminal.info(result.table(numbers))
    if not numbers["problems"]["annotated"]:
        terminal.warning(f"no sample was kept; see {final / result.REJECTED}")
    num_kept: int = numbers["samples"]["kept"]
    terminal.info(f"{final / result.ANNOTATED}: {num_kept} problems with steps")
    return num_kept


def _is_up_to_date(final: Path, job: AnnotationJob) -> bool:
    """Return whether `final` holds the result of `job` and this result has no unanswered requests.

    Raises UserError if `final` holds a result of other settings and `overwrite` is False.
    """
    if not atomic_dir.is_complete(final):
        return False
    old, new = atomic_dir.read_manifest(final, result.KIND)["facts"]["recipe"], job.fingerprint_fields
    if old == new:
        return "unanswered" not in _summary(final)["rejected_by_reason"]  # unanswered requests are sent again
    if job.settings.overwrite:
        return False
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    changes = ", ".join(f"{key}: {_short(old.get(key))} there, {_short(new.get(key))} now" for key in keys)
    raise UserError(
        f"{final} was made with other settings ({changes}); choose another output_dir, or give --overwrite "
        "to replace the result (no response is lost)"
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:13]}..."


def _summary(final: Path) -> dict[str, Any]:
    atomic_dir.verify_digests(final, [result.SUMMARY])
    return json.loads((final / result.SUMMARY).read_text(encoding="utf-8"))
