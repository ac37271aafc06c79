"""Filter a teacher's chains by form, arithmetic and final answer.

Pure functions. The checks run in the order of FILTER_REASONS, and the first that fails gives the reason.

An annotation recomputes if its result is the value of its expression, or that value rounded to at least two decimals
(`<<10/3=3.33>>`). Expressions that the calculator does not accept (percent signs, units, powers) do not recompute,
because the calculator cannot insert their results when a student generates.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from trainer.problems import answers, calculator
from trainer.problems.problem import Problem, Step
from trainer.teacher.parse import ParseError, parse_steps

FILTER_REASONS = {
    "unanswered": "the endpoint gave no answer",
    "truncated": "the text was cut off at max_new_tokens",
    "filtered": "the endpoint's content filter ended the text",
    "no_answer": "no line '#### answer'",
    "no_steps": "there is no text before the answer",
    "unpaired": "sub-questions and solutions do not alternate",
    "bad_step": "a step cannot be stored: it holds the answer delimiter or NUL",
    "too_few_steps": "fewer than min_steps steps",
    "too_many_steps": "more than max_steps steps",
    "bad_annotation": "a calculator annotation is not of the form <<a*b=c>>",
    "no_annotation": "no calculator annotation, and require_annotations is set",
    "wrong_arithmetic": "a calculator annotation does not recompute",
    "wrong_answer": "the final answer is not the gold answer",
    "duplicate": "an earlier sample of the same problem is the same chain",
}
_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_MIN_DECIMALS = 2  # of a rounded result


@dataclass(frozen=True)
class FilterConfig:
    """Requirements on a chain besides a correct answer and arithmetic."""

    style: str
    min_steps: int = 1
    max_steps: int = 12
    require_annotations: bool = False


@dataclass(frozen=True)
class FilterResult:
    """`steps`: () if the text cannot be parsed. `reason`: "" if the chain is kept, else a key of FILTER_REASONS."""

    steps: tuple[Step, ...] = ()
    reason: str = ""
    detail: str = ""

    def __post_init__(self) -> None:
        assert self.reason in ("", *FILTER_REASONS), self.reason

    @property
    def is_kept(self) -> bool:
        return not self.reason


def filter_sample(text: str, finish_reason: str, problem: Problem, config: FilterConfig) -> FilterResult:
    """Filter one text of the teacher. `finish_reason`: the endpoint's "stop", "length" or "content_filter"."""
    if finish_reason == "length":
        return FilterResult(reason="truncated", detail=f"cut off after {len(text)} characters")
    if finish_reason == "content_filter":
        return FilterResult(reason="filtered", detail="")
    try:
        chain = parse_steps(text, config.style)
    except ParseError as error:
        return FilterResult(reason=error.reason, detail=error.detail)
    reason, detail = _first_defect(chain, text, problem, config)
    return FilterResult(chain, reason, detail)


def _first_defect(
    chain: Sequence[Step], text: str, problem: Problem, config: FilterConfig
) -> tuple[str, str]:
    if len(chain) < config.min_steps:
        return "too_few_steps", f"{len(chain)} steps"
    if len(chain) > config.max_steps:
        return "too_many_steps", f"{len(chain)} steps"
    written = " ".join(f"{step.question} {step.solution}" for step in chain)
    annotations = _ANNOTATION.findall(written)
    signs = Counter(re.findall("<<|>>", written))
    if signs["<<"] != len(annotations) or signs[">>"] != len(annotations):
        return "bad_annotation", "<< and >> do not pair up"
    for annotation in annotations:
        if annotation.count("=") != 1:
            return "bad_annotation", f"<<{annotation[:80]}>>"
    if config.require_annotations and not annotations and answers.answer_type(problem.answer) == "number":
        return "no_annotation", ""
    for annotation in annotations:
        expression, _, result = annotation.partition("=")
        if not recomputes(expression, result):
            return "wrong_arithmetic", f"<<{annotation[:80]}>>, it is {calculator.evaluate(expression)}"
    answer = answers.extract_answer(text, "strict")
    if not answers.answers_match(answer, problem.answer):
        return "wrong_answer", f"{(answer or '')[:80]!r}, gold is {problem.answer!r}"
    return "", ""


def recomputes(expression: str, result: str) -> bool:
    """Return whether `result` is the value of `expression`, exactly or rounded to at least two decimals."""
    value = calculator.evaluate(expression)
    written = calculator.evaluate(result)  # accepts 1,080 and -3; the pattern below excludes expressions
    if value is None or written is None or not re.fullmatch(r"\s*-?[0-9,]*\.?[0-9]*\s*", result):
        return False
    if value == written:
        return True
    decimals = len(result.strip().partition(".")[2])
    difference = abs(Decimal(value) - Decimal(written))
    return decimals >= _MIN_DECIMALS and difference <= Decimal(5).scaleb(-decimals - 1)
