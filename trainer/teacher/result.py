"""Result directory of a job: kept chains, rejected samples with reasons, problems without steps, and a summary.

The files depend on the job and the responses only, byte for byte.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.problems.jsonl import record_from_problem
from trainer.problems.problem import Problem
from trainer.teacher.filter import FILTER_REASONS, FilterResult
from trainer.teacher.job import AnnotationJob
from trainer.teacher.responses import Response, ResponseLog, TeacherRequest
from trainer.teacher.settings import AnnotateSettings

KIND = "annotations"
ANNOTATED = "annotated.jsonl"
REJECTED = "rejected.jsonl"
SUMMARY = "summary.json"
_WIDTH = 110  # of the tables, in characters


@dataclass(frozen=True)
class Sample:
    """One request, its response (or None) and the result of the filter."""

    request: TeacherRequest
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
    unannotated = (result for result in results if not result.kept_samples)
    files: dict[str, Iterable[dict[str, Any]]] = {
        ANNOTATED: (record for result in results for record in _annotated(job, result)),
        REJECTED: (
            {
                "id": result.problem.id,
                "sample": sample.request.sample,
                "reason": sample.result.reason,
                "detail": sample.result.detail,
                "text": None if sample.response is None else sample.response.text,
                "response": sample.request.key,
            }
            for result in results
            for sample in result.samples
            if not sample.result.is_kept
        ),
        "unannotated.jsonl": (
            record_from_problem(o.problem, {"reasons": [sample.result.reason for sample in o.samples]})
            for o in unannotated
        ),
        "contaminated.jsonl": (
            record_from_problem(problem, {"matches": match}) for problem, match in job.contaminated
        ),
        "bad_records.jsonl": map(dataclasses.asdict, job.bad_records),
        "exemplars.jsonl": map(record_from_problem, job.prompt_builder.exemplars),
    }
    for name, records in files.items():
        # UTF-8 cannot encode a lone surrogate, which a teacher may write; the JSON escape can.
        with open(folder / name, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "prompt.j2").write_text(job.prompt_builder.source, encoding="utf-8")
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


def summarise(job: AnnotationJob, results: Sequence[ProblemResult], log: ResponseLog) -> dict[str, Any]:
    """Return the content of summary.json. Tokens and cost include responses of earlier runs that are used."""
    samples = [(result, sample) for result in results for sample in result.samples]
    kept = sum(sample.result.is_kept for _, sample in samples)
    reasons = Counter(sample.result.reason for _, sample in samples if not sample.result.is_kept)
    used = {sample.request.key: sample.response for _, sample in samples if sample.response is not None}
    counted = [r for r in used.values() if r.prompt_tokens is not None and r.completion_tokens is not None]
    num_annotated = sum(bool(result.kept_samples) for result in results)
    summary: dict[str, Any] = {
        "teacher": job.teacher,
        "style": job.settings.style,
        "gold_hint": job.settings.gold_hint,
        "problems": {
            "annotated": num_annotated,
            "unannotated": len(results) - num_annotated,
            "contaminated": len(job.contaminated),
            "bad_records": len(job.bad_records),
        },
        "samples": {"kept": kept, "rejected": len(samples) - kept},
        "keep_rate": _rate(kept, len(samples)),
        "annotated_rate": _rate(num_annotated, len(results)),
        "rejected_by_reason": {reason: reasons[reason] for reason in FILTER_REASONS if reasons[reason]},
        # "unread": the text could not be parsed
        "by_steps_written": _by_num_steps(samples, lambda _, sample: len(sample.result.steps)),
        "responses": {"used": len(used), "kept_from_other_prompts_or_models": log.num_unused(used)},
        "tokens": {
            "prompt": sum(response.prompt_tokens or 0 for response in counted),
            "completion": sum(response.completion_tokens or 0 for response in counted),
            "responses_without_usage": len(used) - len(counted),
        },
    }
    if any(result.problem.steps for result in results):
        summary["by_gold_steps"] = _by_num_steps(samples, lambda result, _: len(result.problem.steps))
    cost = cost_of(summary["tokens"]["prompt"], summary["tokens"]["completion"], job.settings)
    return summary if cost is None else {**summary, "cost": cost}


def cost_of(prompt_tokens: float, completion_tokens: float, settings: AnnotateSettings) -> float | None:
    """Return the cost in the currency of the prices, or None without prices."""
    if not settings.price_per_million_input and not settings.price_per_million_output:
        return None
    return (
        prompt_tokens * settings.price_per_million_input
        + completion_tokens * settings.price_per_million_output
    ) / 1e6


def table(summary: dict[str, Any]) -> str:
    """Return the summary as text for a terminal."""
    problems, samples, tokens = summary["problems"], summary["samples"], summary["tokens"]
    hint = " (the gold answer was shown to the teacher)" if summary["gold_hint"] else ""
    lines = [
        f"{problems['annotated']} problems annotated, {problems['unannotated']} not; left out: "
        f"{problems['contaminated']} like test questions, {problems['bad_records']} bad records",
        f"{samples['kept']} of {samples['kept'] + samples['rejected']} samples kept{hint}",
    ]
    for key, title in (("by_steps_written", "steps written"), ("by_gold_steps", "steps in the data")):
        rates = summary.get(key, {}).items()
        rows = [[n, str(r["samples"]), str(r["kept"]), f"{100 * r['keep_rate']:.1f} %"] for n, r in rates]
        if key in summary:
            lines.append(_aligned([title, "samples", "kept", "keep rate"], rows))
    if rejected := summary["rejected_by_reason"]:
        rows = [[reason, str(count), FILTER_REASONS[reason]] for reason, count in rejected.items()]
        lines.append(_aligned(["rejected", "samples", "meaning"], rows))
    usage = f"{tokens['prompt']} prompt and {tokens['completion']} completion tokens"
    if tokens["responses_without_usage"]:
        usage += f" ({tokens['responses_without_usage']} responses came without a count)"
    lines.append(usage + (f", cost {summary['cost']:.4f}" if "cost" in summary else ""))
    if others := summary["responses"]["kept_from_other_prompts_or_models"]:
        lines.append(
            f"{others} responses of other prompts, models or samples are kept in the log and not used"
        )
    return "\n".join(lines)


def _by_num_steps(
    samples: Sequence[tuple[ProblemResult, Sample]], num_steps: Callable[[ProblemResult, Sample], int]
) -> dict[str, dict]:
    """Return kept samples, all samples and the rate by number of steps."""
    kept: Counter[int] = Counter()
    total: Counter[int] = Counter()
    for result, sample in samples:
        number = num_steps(result, sample)
        total[number] += 1
        kept[number] += sample.result.is_kept
    return {
        str(number) if number else "unread": {
            "kept": kept[number],
            "samples": total[number],
            "keep_rate": _rate(kept[number], total[number]),
        }
        for number in sorted(total)
    }


def _rate(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _aligned(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    shown = Table(*titles, box=None)
    for row in rows:
        shown.add_row(*row)
    console = Console(file=io.StringIO(), width=_WIDTH)
    with console.capture() as captured:
        console.print(shown)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
