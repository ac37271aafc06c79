"""Answers -> the finished directory: which chains are kept, which are not and why, and what is left without steps.

The files are a function of the work and of the answers: whoever has these gets the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.problems.jsonl import to_record
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
    """One answer and what became of it. `response` is None if there is none."""

    request: Request
    response: Response | None
    result: FilterResult


@dataclass(frozen=True)
class ProblemResult:
    """A problem and its samples, in order; without keep_all the samples end with the first that is kept."""

    problem: Problem
    samples: tuple[Sample, ...]

    @property
    def kept_samples(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.result.is_kept]


def problem_results(work: AnnotationJob, log: ResponseLog) -> Iterator[ProblemResult]:
    """Judge the answers to every problem, in the order of the data."""
    for problem in work.problems:
        samples: list[Sample] = []
        for request in work.requests[problem.id]:
            response = log.get(request.key)
            verdict = FilterResult(reason="unanswered")
            if response is not None:
                verdict = work.filter(request, response)
            if verdict.is_kept and any(
                verdict.steps == other.result.steps for other in samples if other.result.is_kept
            ):
                verdict = dataclasses.replace(verdict, reason="duplicate")
            samples.append(Sample(request, response, verdict))
            if verdict.is_kept and not work.settings.keep_all:
                break
        yield ProblemResult(problem, tuple(samples))


def write(
    folder: Path, work: AnnotationJob, all_outcomes: Sequence[ProblemResult], summary: dict[str, Any]
) -> None:
    """Write every file of the directory."""
    _write_lines(folder / ANNOTATED, (r for outcome in all_outcomes for r in _annotated(work, outcome)))
    _write_lines(folder / REJECTED, (r for outcome in all_outcomes for r in _rejected(outcome)))
    without = (outcome for outcome in all_outcomes if not outcome.kept_samples)
    _write_lines(
        folder / UNANNOTATED,
        (to_record(o.problem, {"reasons": [sample.result.reason for sample in o.samples]}) for o in without),
    )
    _write_lines(
        folder / CONTAMINATED,
        (to_record(problem, {"matches": match}) for problem, match in work.contaminated),
    )
    _write_lines(folder / BAD_RECORDS, map(dataclasses.asdict, work.bad_records))
    _write_lines(folder / EXEMPLARS, map(to_record, work.prompter.exemplars))
    (folder / PROMPT).write_text(work.prompter.source, encoding="utf-8")
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _annotated(work: AnnotationJob, outcome: ProblemResult) -> Iterator[dict[str, Any]]:
    """The problem with the steps of each kept sample; a second one is `<id>#2`."""
    for number, sample in enumerate(outcome.kept_samples, start=1):
        id = outcome.problem.id if number == 1 else f"{outcome.problem.id}#{number}"
        problem = dataclasses.replace(outcome.problem, id=id, steps=sample.result.steps)
        meta = {
            "teacher": work.teacher["model"],
            "style": work.settings.style,
            "gold_hint": work.settings.gold_hint,
            "sample": sample.request.sample,
            "prompt": work.prompter.digest,
            "response": sample.request.key,
        }
        yield to_record(problem, meta)


def _rejected(outcome: ProblemResult) -> Iterator[dict[str, Any]]:
    for sample in outcome.samples:
        if not sample.result.is_kept:
            yield {
                "id": outcome.problem.id,
                "sample": sample.request.sample,
                "reason": sample.result.reason,
                "detail": sample.result.detail,
                "text": None if sample.response is None else sample.response.text,
                "response": sample.request.key,
            }


def _write_lines(path: Path, records: Iterable[Any]) -> None:
    # A teacher may write half a surrogate pair, which no UTF-8 file can hold; JSON spells it as JSON escapes it.
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
