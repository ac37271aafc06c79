"""Keep a teacher's chain only if everything about it that can be checked is right.

Pure functions. The checks run in the order of REASONS, and the first that fails gives the reason.

An annotation recomputes if its result is the value of its expression, or that value rounded to the decimals written,
at least two (`<<10/3=3.33>>`). What the calculator does not accept (percent signs, units, powers) does not recompute:
a student could never be handed its result.
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
    "truncated": "the text was cut off at its greatest length",
    "filtered": "the endpoint's content filter ended the text",
    "no_answer": "no line '#### answer'",
    "no_steps": "nothing stands before the answer",
    "unpaired": "sub-questions and solutions do not alternate",
    "bad_step": "a step cannot be stored: it holds the answer delimiter or NUL",
    "too_few_steps": "fewer than min_steps steps",
    "too_many_steps": "more than max_steps steps",
    "bad_annotation": "a calculator annotation is not of the form <<a*b=c>>",
    "no_annotation": "no calculator annotation, and require_annotations is set",
    "wrong_arithmetic": "a calculator annotation does not recompute",
    "wrong_answer": "the final answer is not the gold one",
    "duplicate": "an earlier sample of the same problem is the same chain",
}
_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_LEAST_DECIMALS = 2  # of a rounded result


@dataclass(frozen=True)
class FilterConfig:
    """What a chain must be, besides right."""

    style: str
    min_steps: int = 1
    max_steps: int = 12
    require_annotations: bool = False


@dataclass(frozen=True)
class FilterResult:
    """`steps` of the chain, () where it could not be read; `reason` is "" if it is kept, else a key of REASONS."""

    steps: tuple[Step, ...] = ()
    reason: str = ""
    detail: str = ""

    def __post_init__(self) -> None:
        assert self.reason in ("", *FILTER_REASONS), self.reason

    @property
    def is_kept(self) -> bool:
        return not self.reason


def filter_sample(text: str, finish_reason: str, problem: Problem, rules: FilterConfig) -> FilterResult:
    """Judge one text of the teacher. `finish_reason`: the endpoint's, "stop", "length" or "content_filter"."""
    if finish_reason == "length":
        return FilterResult(reason="truncated", detail=f"cut off after {len(text)} characters")
    if finish_reason == "content_filter":
        return FilterResult(reason="filtered", detail="")
    try:
        chain = parse_steps(text, rules.style)
    except ParseError as error:
        return FilterResult(reason=error.reason, detail=error.detail)
    reason, detail = _first_fault(chain, text, problem, rules)
    return FilterResult(chain, reason, detail)


def _first_fault(chain: Sequence[Step], text: str, problem: Problem, rules: FilterConfig) -> tuple[str, str]:
    if len(chain) < rules.min_steps:
        return "too_few_steps", f"{len(chain)} steps"
    if len(chain) > rules.max_steps:
        return "too_many_steps", f"{len(chain)} steps"
    written = " ".join(f"{step.question} {step.solution}" for step in chain)
    annotations = _ANNOTATION.findall(written)
    signs = Counter(re.findall("<<|>>", written))
    if signs["<<"] != len(annotations) or signs[">>"] != len(annotations):
        return "bad_annotation", "<< and >> do not pair up"
    for annotation in annotations:
        if annotation.count("=") != 1:
            return "bad_annotation", f"<<{annotation[:80]}>>"
    if rules.require_annotations and not annotations and answers.answer_type(problem.answer) == "number":
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
    """Whether the calculator gets `result` for `expression`, exactly or rounded to at least two decimals."""
    value = calculator.evaluate(expression)
    written = calculator.evaluate(result)  # reads 1,080 and -3 as numbers; nothing longer is a result
    if value is None or written is None or not re.fullmatch(r"\s*-?[0-9,]*\.?[0-9]*\s*", result):
        return False
    if value == written:
        return True
    decimals = len(result.strip().partition(".")[2])
    difference = abs(Decimal(value) - Decimal(written))
    return decimals >= _LEAST_DECIMALS and difference <= Decimal(5).scaleb(-decimals - 1)
