"""Annotate problems with a teacher: read, ask what was not asked before, verify, commit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.runtime import directory_lock, terminal
from trainer.storage import atomic_dir
from trainer.storage.run_directory import AnnotationDirectory
from trainer.teacher import job, result, summary
from trainer.teacher.job import AnnotationJob
from trainer.teacher.responses import ResponseLog
from trainer.teacher.settings import AnnotateSettings

_CHARACTERS_A_TOKEN = 4  # of English, about


def annotate(settings: AnnotateSettings) -> None:
    """Write `<output_dir>/result`. What was answered before, by this or by a killed run, is not asked again.

    Raises UserError for bad input, for a result of another making, for an output_dir in use, for an endpoint that does
    not answer.
    """
    directory = AnnotationDirectory(Path(settings.output_dir))
    with directory_lock.locked(directory.lock):
        todo = _prepare(settings)
        if _is_there(directory.result, todo):
            terminal.info(summary.table(_summary(directory.result)))
            terminal.info(f"{directory.result}: already annotated")
            return
        log = ResponseLog(directory.responses, directory.corrupt_lines)
        try:
            _query(todo, log)
            _publish(directory.result, todo, log)
        finally:
            log.close()


def print_plan(settings: AnnotateSettings) -> None:
    """Say what a run would ask and cost at most, and show one prompt. Asks nothing and writes nothing."""
    directory = AnnotationDirectory(Path(settings.output_dir))
    todo = _prepare(settings)
    log = ResponseLog(directory.responses, directory.corrupt_lines, read_only=True)
    requests = [request for queue in todo.requests.values() for request in queue]
    answered = sum(log.get(request.key) is not None for request in requests)
    queues = todo.queues(log)
    least, most = len(queues), sum(log.get(request.key) is None for queue in queues for request in queue)
    prompt_tokens = (
        sum(len(r.prompt) for q in queues for r in q if log.get(r.key) is None) / _CHARACTERS_A_TOKEN
    )
    terminal.info(
        f"{len(todo.problems)} problems to annotate; left out: {len(todo.contaminated)} like test questions, "
        f"{len(todo.bad_records)} bad records"
    )
    now = f"{most}" if least == most else f"{least} to {most}"
    terminal.info(f"{len(requests)} requests at most, {answered} of them already answered; a run sends {now}")
    terminal.info(
        f"about {prompt_tokens:,.0f} prompt tokens and at most {most * settings.max_new_tokens:,} completion tokens"
    )
    cost = summary.cost_of(prompt_tokens, most * settings.max_new_tokens, settings)
    if cost is not None:
        terminal.info(f"cost at most about {cost:.2f}")
    first = todo.problems[0]
    terminal.info(f"the prompt for {first.id}:\n\n{todo.requests[first.id][0].prompt}\n")


def _prepare(settings: AnnotateSettings) -> AnnotationJob:
    if settings.base_url:
        from trainer.teacher.endpoint import check_url

        check_url(settings.base_url)
        return job.prepare_job(settings)
    from trainer.teacher.local_model import digest

    return job.prepare_job(settings, digest(settings.model_name_or_path))


def _query(todo: AnnotationJob, log: ResponseLog) -> None:
    queues = todo.queues(log)
    known = sum(
        log.get(request.key) is not None for requests in todo.requests.values() for request in requests
    )
    terminal.info(
        f"{len(todo.problems)} problems, {known} answers known; asking {todo.teacher['model']} "
        f"for {len(queues)} {'samples' if todo.settings.keep_all else 'problems'}"
    )
    if not queues:
        return
    if todo.settings.base_url:
        from trainer.teacher.endpoint_queries import query_endpoint

        query_endpoint(todo.settings, queues, log, todo.is_satisfied)
    else:
        from trainer.teacher.local_model import query_local_model

        query_local_model(todo.settings, queues, log, todo.is_satisfied)


def _publish(final: Path, todo: AnnotationJob, log: ResponseLog) -> None:
    outcomes = list(result.problem_results(todo, log))
    numbers = summary.summarise(todo, outcomes, log)
    facts: dict[str, Any] = {
        "recipe": todo.fingerprint_fields,
        "teacher": todo.teacher,
        "gold_hint": todo.settings.gold_hint,
    }
    facts |= {"endpoint": todo.settings.base_url, "summary": numbers}
    there = atomic_dir.is_complete(final)
    building = final.parent / f"{final.name}.new-{os.getpid()}" if there else final
    with atomic_dir.atomic_directory(building, result.KIND, facts) as staging:
        result.write(staging, todo, outcomes, numbers)
    if there:
        atomic_dir.replace_directory(final, building)
    terminal.info(summary.table(numbers))
    if not numbers["problems"]["annotated"]:
        terminal.warning(f"not one chain was kept; {final / result.REJECTED} says why")
    terminal.info(f"{final / result.ANNOTATED}: {numbers['samples']['kept']} problems with steps")


def _is_there(final: Path, todo: AnnotationJob) -> bool:
    """Whether the finished result is the one asked for. Raises UserError if it is of another making."""
    if not atomic_dir.is_complete(final):
        return False
    old, new = atomic_dir.read_manifest(final, result.KIND)["facts"]["recipe"], todo.fingerprint_fields
    if old == new:
        return "unanswered" not in _summary(final)["rejected_by_reason"]  # else those are asked for again
    if todo.settings.overwrite:
        return False
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    changes = ", ".join(f"{key}: {_short(old.get(key))} there, {_short(new.get(key))} now" for key in keys)
    raise UserError(
        f"{final} holds annotations made in another way ({changes}); choose another output_dir, or give --overwrite "
        "to replace the result (no response is lost)"
    )


def _summary(final: Path) -> dict[str, Any]:
    atomic_dir.verify_digests(final, [result.SUMMARY])
    return json.loads((final / result.SUMMARY).read_text(encoding="utf-8"))


def _short(value: object) -> str:
    """For a message: the beginning of a digest tells it from another one."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:13]}..."
