"""Result directory of a job: annotated problems, rejected samples with reasons, problems left out, and a summary.

The bytes of the files depend only on the job and the content of the response log.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from trainer.problems.jsonl import record_from_problem
from trainer.problems.problem import Problem
from trainer.runtime import terminal
from trainer.teacher.filter import FILTER_REASONS, FilterResult
from trainer.teacher.job import AnnotationJob
from trainer.teacher.responses import Response, ResponseLog, TeacherRequest
from trainer.teacher.settings import AnnotateSettings

KIND = "annotations"
ANNOTATED = "annotated.jsonl"
REJECTED = "rejected.jsonl"
SUMMARY = "summary.json"
_WIDTH = 110  # characters per line of the tables


@dataclass(frozen=True)
class Sample:
    """A request, its response (None if there is none yet), and the filter's result for this response."""

    request: TeacherRequest
    response: Response | None
    result: FilterResult


@dataclass(frozen=True)
class ProblemResult:
    """A problem and its samples in order. Without `keep_all`, `samples` ends at the first kept sample."""

    problem: Problem
    samples: tuple[Sample, ...]

    @property
    def kept_samples(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.result.is_kept]


def problem_results(job: AnnotationJob, log: ResponseLog) -> Iterator[ProblemResult]:
    """Yield the result of every problem of the job, in the order of the data."""
    for problem in job.problems:
        samples: list[Sample] = []
        for request in job.requests[problem.id]:
            response = log.get(request.key)
            result = job.filter(request, response) if response else FilterResult(reason="unanswered")
            kept_steps = [sample.result.steps for sample in samples if sample.result.is_kept]
            if result.is_kept and result.steps in kept_steps:
                result = dataclasses.replace(result, reason="duplicate")
            samples.append(Sample(request, response, result))
            if result.is_kept and not job.settings.keep_all:
                break
        yield ProblemResult(problem, tuple(samples))


def write(
    folder: Path, job: AnnotationJob, results: Sequence[ProblemResult], summary: dict[str, Any]
) -> None:
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
            record_from_problem(r.problem, {"reasons": [sample.result.reason for sample in r.samples]})
            for r in results
            if not r.kept_samples
        ),
        "contaminated.jsonl": (
            record_from_problem(problem, {"matches": match}) for problem, match in job.contaminated
        ),
        "bad_records.jsonl": map(dataclasses.asdict, job.bad_records),
        "exemplars.jsonl": map(record_from_problem, job.prompt_builder.exemplars),
    }
    for name, records in files.items():
        # A teacher may write a lone surrogate. UTF-8 cannot encode it; `backslashreplace` writes a JSON escape.
        with open(folder / name, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "prompt.j2").write_text(job.prompt_builder.source, encoding="utf-8")
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _annotated(job: AnnotationJob, result: ProblemResult) -> Iterator[dict[str, Any]]:
    """Yield one record per kept sample of a problem. The second record has the id `<id>#2`, the third `<id>#3`, and so on."""
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
    """Return the content of summary.json. Tokens and cost also include the responses of earlier runs that this job uses."""
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
        # the key "unread" counts samples without steps: no response, or a response that was not parsed
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
    """Return the cost in the currency of the prices, or None if both prices are 0."""
    input_price, output_price = settings.price_per_million_input, settings.price_per_million_output
    if not input_price and not output_price:
        return None
    return (prompt_tokens * input_price + completion_tokens * output_price) / 1e6


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
        if key in summary:
            rates = summary[key].items()
            rows = [[n, str(r["samples"]), str(r["kept"]), f"{100 * r['keep_rate']:.1f} %"] for n, r in rates]
            lines.append(_aligned([title, "samples", "kept", "keep rate"], rows))
    if rejected := summary["rejected_by_reason"]:
        rows = [[reason, str(count), FILTER_REASONS[reason]] for reason, count in rejected.items()]
        lines.append(_aligned(["rejected", "samples", "meaning"], rows))
    usage = f"{tokens['prompt']} prompt and {tokens['completion']} completion tokens"
    if tokens["responses_without_usage"]:
        usage += f" ({tokens['responses_without_usage']} responses came without a count)"
    lines.append(usage + (f", cost {summary['cost']:.4f}" if "cost" in summary else ""))
    if others := summary["responses"]["kept_from_other_prompts_or_models"]:
        lines.append(f"{others} responses of other prompts, models or samples stay in the log, unused")
    return "\n".join(lines)


def _by_num_steps(
    samples: Sequence[tuple[ProblemResult, Sample]], num_steps: Callable[[ProblemResult, Sample], int]
) -> dict[str, dict]:
    """Return {number of steps: {"kept", "samples", "keep_rate"}}. The key for 0 steps is "unread"."""
    total = Counter(num_steps(*pair) for pair in samples)
    kept = Counter(num_steps(*pair) for pair in samples if pair[1].result.is_kept)
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
    grid = Table(*titles, box=None)
    for row in rows:
        grid.add_row(*row)
    return terminal.table_text(grid, _WIDTH)
