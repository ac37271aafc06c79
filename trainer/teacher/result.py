"""Result directory of a job: kept chains, rejected samples with reasons, and problems without steps.

The files depend on the job and the responses only, byte for byte.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.problems.jsonl import record_from_problem
from trainer.problems.problem import Problem
from trainer.teacher.filter import FilterResult
from trainer.teacher.job import AnnotationJob
from trainer.teacher.responses import Request, Response, ResponseLog

KIND = "annotations"
ANNOTATED = "annotated.jsonl"
REJECTED = "rejected.jsonl"
UNANNOTATED = "unannotated.jsonl"
CONTAMINATED = "contaminated.jsonl"
BAD_RECORDS = "bad_records.jsonl"
SUMMARY = "summary.json"
PROMPT = "prompt.j2"
EXEMPLARS = "exemplars.jsonl"


@dataclass(frozen=True)
class Sample:
    """One request, its response (or None) and the result of the filter."""

    request: Request
    response: Response | None
    result: FilterResult


@dataclass(frozen=True)
class ProblemResult:
    """A problem and its samples in order; without keep_all the samples end with the first kept one."""

    problem: Problem
    samples: tuple[Sample, ...]

    @property
    def kept_samples(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.result.is_kept]


def problem_results(job: AnnotationJob, log: ResponseLog) -> Iterator[ProblemResult]:
    """Yield the filtered samples of every problem, in the order of the data."""
    for problem in job.problems:
        samples: list[Sample] = []
        for request in job.requests[problem.id]:
            response = log.get(request.key)
            result = FilterResult(reason="unanswered")
            if response is not None:
                result = job.filter(request, response)
            kept_steps = [other.result.steps for other in samples if other.result.is_kept]
            if result.is_kept and result.steps in kept_steps:
                result = dataclasses.replace(result, reason="duplicate")
            samples.append(Sample(request, response, result))
            if result.is_kept and not job.settings.keep_all:
                break
        yield ProblemResult(problem, tuple(samples))


def write(
    folder: Path, job: AnnotationJob, results: Sequence[ProblemResult], summary: dict[str, Any]
) -> None:
    """Write all files of the result directory into `folder`."""
    _write_lines(folder / ANNOTATED, (r for result in results for r in _annotated(job, result)))
    _write_lines(folder / REJECTED, (r for result in results for r in _rejected(result)))
    unannotated = (result for result in results if not result.kept_samples)
    _write_lines(
        folder / UNANNOTATED,
        (
            record_from_problem(o.problem, {"reasons": [sample.result.reason for sample in o.samples]})
            for o in unannotated
        ),
    )
    _write_lines(
        folder / CONTAMINATED,
        (record_from_problem(problem, {"matches": match}) for problem, match in job.contaminated),
    )
    _write_lines(folder / BAD_RECORDS, map(dataclasses.asdict, job.bad_records))
    _write_lines(folder / EXEMPLARS, map(record_from_problem, job.prompt_builder.exemplars))
    (folder / PROMPT).write_text(job.prompt_builder.source, encoding="utf-8")
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _annotated(job: AnnotationJob, result: ProblemResult) -> Iterator[dict[str, Any]]:
    """Yield the problem with the steps of each kept sample; the second is `<id>#2`."""
    for number, sample in enumerate(result.kept_samples, start=1):
        id = result.problem.id if number == 1 else f"{result.problem.id}#{number}"
        problem = dataclasses.replace(result.problem, id=id, steps=sample.result.steps)
        meta = {
            "teacher": job.teacher["model"],
            "style": job.settings.style,
            "gold_hint": job.settings.gold_hint,
            "sample": sample.request.sample,
            "prompt": job.prompt_builder.digest,
            "response": sample.request.key,
        }
        yield record_from_problem(problem, meta)


def _rejected(result: ProblemResult) -> Iterator[dict[str, Any]]:
    for sample in result.samples:
        if not sample.result.is_kept:
            yield {
                "id": result.problem.id,
                "sample": sample.request.sample,
                "reason": sample.result.reason,
                "detail": sample.result.detail,
                "text": None if sample.response is None else sample.response.text,
                "response": sample.request.key,
            }


def _write_lines(path: Path, records: Iterable[Any]) -> None:
    # UTF-8 cannot encode a lone surrogate, which a teacher may write; the JSON escape can.
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
