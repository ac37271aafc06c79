"""Summary of a result in numbers, and as a table for the terminal."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.teacher.filter import FILTER_REASONS
from trainer.teacher.job import AnnotationJob
from trainer.teacher.responses import Response, ResponseLog
from trainer.teacher.result import ProblemResult, Sample
from trainer.teacher.settings import AnnotateSettings

_WIDTH = 110


def summarise(job: AnnotationJob, results: Sequence[ProblemResult], log: ResponseLog) -> dict[str, Any]:
    """Return the content of summary.json. Tokens and cost include responses of earlier runs that are used."""
    samples = [(result, sample) for result in results for sample in result.samples]
    kept = sum(sample.result.is_kept for _, sample in samples)
    reasons = Counter(sample.result.reason for _, sample in samples if not sample.result.is_kept)
    used = {sample.request.key: sample.response for _, sample in samples if sample.response is not None}
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
        "tokens": _tokens(list(used.values())),
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
        if key in summary:
            lines.append(_rates(summary[key], title))
    if summary["rejected_by_reason"]:
        reasons = Table("rejected", "samples", "meaning", box=None)
        for reason, count in summary["rejected_by_reason"].items():
            reasons.add_row(reason, str(count), FILTER_REASONS[reason])
        lines.append(_text(reasons))
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


def _tokens(responses: Sequence[Response]) -> dict[str, int]:
    counted = [r for r in responses if r.prompt_tokens is not None and r.completion_tokens is not None]
    return {
        "prompt": sum(response.prompt_tokens or 0 for response in counted),
        "completion": sum(response.completion_tokens or 0 for response in counted),
        "responses_without_usage": len(responses) - len(counted),
    }


def _rate(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _rates(rates: dict[str, dict], title: str) -> str:
    shown = Table(title, "samples", "kept", "keep rate", box=None)
    for number, rate in rates.items():
        shown.add_row(number, str(rate["samples"]), str(rate["kept"]), f"{100 * rate['keep_rate']:.1f} %")
    return _text(shown)


def _text(shown: Table) -> str:
    console = Console(file=io.StringIO(), width=_WIDTH)
    with console.capture() as captured:
        console.print(shown)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
