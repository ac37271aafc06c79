"""Parse a teacher's texts into steps, and reject texts with a wrong form, wrong arithmetic or a wrong final answer.

All functions are pure. The checks run in the order of FILTER_REASONS. The first failed check determines the reason.

The result in a calculator annotation must be the value of its expression, exactly or rounded to at least two decimals
(`<<10/3=3.33>>`). Expressions that the calculator does not accept (percent signs, units, powers) are rejected, because the
calculator could not insert their results when a trained model generates.

A text consists of lines of steps and a line `#### answer`. In the style `cot`, every line is a solution. In the style
`socratic`, sub-questions and solutions alternate, starting with a sub-question. These variations are accepted, and
everything that is not part of a step is removed:

- blank lines, lines that start with ```, and one introduction that ends with a colon ("Here is the solution:");
- a bullet (`- `, `* `) or a number (`1. `, `2) `, `Step 3: `) before a line, and the asterisks of `**bold**` at its start;
- socratic: the labels `Q:`, `Question 2:`, `Sub-question:` and `A:`, `S:`, `Answer:`, `Solution 2:`. In a text with
  labels, a line without a label continues the line above. In other texts, no line continues another line;
- socratic: sub-question and solution on one line, `sub-question ** solution`, as in GSM8K's files;
- anything after the line of the answer.

In a text without labels and without ` ** `, sub-questions must end with a question mark and solutions must not. Otherwise,
a missing line would pair every later sub-question with the wrong solution.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from trainer.problems import answers, calculator
from trainer.problems.problem import DELIMITER, Problem, RecordError, Step, one_line

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
    "wrong_arithmetic": "the result of a calculator annotation is wrong",
    "wrong_answer": "the final answer is not the gold answer",
    "duplicate": "an earlier sample of the same problem has the same steps",
}
_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_MIN_DECIMALS = 2  # minimum number of decimals of a rounded result
_BULLET = re.compile(r"(?:[-*•]\s+)?(?:\*\*(?P<bold>[^*]+)\*\*)?")
_NUMBER = re.compile(r"(?:step\s*)?\(?[0-9]{1,2}\s?[.):]\s+|step\s*[0-9]{1,2}\s*[:.]\s*", re.IGNORECASE)
_LABEL = re.compile(
    r"(?:(?P<question>sub-?\s?question|question|q)|(?:solution|answer|a|s))\s?(?:[0-9]{1,2}\s?[.:)]|:)(?:\s+|$)",
    re.IGNORECASE,
)
_PAIR = " ** "


@dataclass(frozen=True)
class FilterConfig:
    """Additional requirements on a teacher's steps. The answer and the arithmetic must always be correct."""

    style: str
    min_steps: int = 1
    max_steps: int = 12
    require_annotations: bool = False


@dataclass(frozen=True)
class FilterResult:
    """Result of the filter for one text.

    `steps`: steps of the text, kept or not; () if the text was not parsed. `reason`: "" if the steps are kept, else a key of
    FILTER_REASONS. `detail`: the fault in the text; may be "".
    """

    steps: tuple[Step, ...] = ()
    reason: str = ""
    detail: str = ""

    def __post_init__(self) -> None:
        assert self.reason in ("", *FILTER_REASONS), self.reason

    @property
    def is_kept(self) -> bool:
        return not self.reason


def filter_sample(text: str, finish_reason: str, problem: Problem, config: FilterConfig) -> FilterResult:
    """Parse and check one text of the teacher. `finish_reason`: "stop", "length" or "content_filter"."""
    if finish_reason == "length":
        return FilterResult(reason="truncated", detail=f"cut off after {len(text)} characters")
    if finish_reason == "content_filter":
        return FilterResult(reason="filtered")
    try:
        steps = parse_steps(text, config.style)
    except ParseError as error:
        return FilterResult(reason=error.reason, detail=error.detail)
    return FilterResult(steps, *_first_defect(steps, text, problem, config))


def _first_defect(
    steps: Sequence[Step], text: str, problem: Problem, config: FilterConfig
) -> tuple[str, str]:
    if len(steps) < config.min_steps:
        return "too_few_steps", f"{len(steps)} steps"
    if len(steps) > config.max_steps:
        return "too_many_steps", f"{len(steps)} steps"
    written = " ".join(f"{step.question} {step.solution}" for step in steps)
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
        if not evaluates_to(expression, result):
            return "wrong_arithmetic", f"<<{annotation[:80]}>>, it is {calculator.evaluate(expression)}"
    answer = answers.extract_answer(text, "strict")
    if not answers.answers_match(answer, problem.answer):
        return "wrong_answer", f"{(answer or '')[:80]!r}, gold is {problem.answer!r}"
    return "", ""


def evaluates_to(expression: str, result: str) -> bool:
    """Return whether `result` is the value of `expression`, exactly or rounded to at least two decimals."""
    value = calculator.evaluate(expression)
    written = calculator.evaluate(result)  # the calculator also accepts "1+2"; the pattern below rejects it
    if value is None or written is None or not re.fullmatch(r"\s*-?[0-9,]*\.?[0-9]*\s*", result):
        return False
    if value == written:
        return True
    decimals = len(result.strip().partition(".")[2])
    difference = abs(Decimal(value) - Decimal(written))
    return decimals >= _MIN_DECIMALS and difference <= Decimal(5).scaleb(-decimals - 1)


class ParseError(Exception):
    """Raised if a text cannot be parsed into steps. `reason`: "no_answer", "no_steps", "unpaired" or "bad_step"."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def parse_steps(text: str, style: str) -> tuple[Step, ...]:
    """Return the steps before `#### answer` in a text of style "cot" or "socratic". Raises ParseError for other formats."""
    body, delimiter, answer = text.rpartition(DELIMITER)
    if not delimiter or not answer.partition("\n")[0].strip():
        raise ParseError("no_answer", f"no line '{DELIMITER} answer'")
    stripped = map(str.strip, body.split("\n"))
    lines = [line for line in stripped if line and not line.startswith("```")]
    # Remove an introduction ("Here is the solution:"), but not a step (has a digit) or a sub-question (has "?" or a label).
    if lines and lines[0].endswith(":") and not re.search("[0-9?]", lines[0]) and not _label(lines[0])[0]:
        del lines[0]
    if not lines:
        raise ParseError("no_steps", f"there is no text before {DELIMITER}")
    try:
        if style == "cot":
            return tuple(Step(solution=one_line(_strip_decoration(line))) for line in lines)
        return tuple(Step(question, solution) for question, solution in _pairs(lines))
    except RecordError as error:
        raise ParseError("bad_step", error.detail) from None


def _pairs(lines: Sequence[str]) -> list[tuple[str, str]]:
    if all(_PAIR in line for line in lines):
        halves = (_strip_decoration(line).split(_PAIR, 1) for line in lines)
        texts = [(label, one_line(half)) for pair in halves for label, half in zip("qs", pair, strict=True)]
    else:
        plain = (one_line(_strip_decoration(line)) for line in lines)
        texts = _labelled(lines) or [("q" if line.endswith("?") else "s", line) for line in plain]
    for number, (label, text) in enumerate(texts):
        if label != "qs"[number % 2] or not text:
            expected = "sub-question" if number % 2 == 0 else "solution"
            raise ParseError("unpaired", f"expected a {expected} as text {number + 1}, found {text[:80]!r}")
    if len(texts) % 2:
        raise ParseError("unpaired", f"the last sub-question has no solution: {texts[-1][1][:80]!r}")
    plain_texts = [text for _, text in texts]
    return list(zip(plain_texts[0::2], plain_texts[1::2], strict=True))


def _labelled(lines: Sequence[str]) -> list[tuple[str, str]]:
    """Join each labelled line with the unlabelled lines below it. Return pairs ("q" or "s", text); [] if no line has a label."""
    texts: list[tuple[str, str]] = []
    labels = [_label(line) for line in lines]
    if not any(label for label, _ in labels):
        return []
    for label, text in labels:
        if label:
            texts.append((label, text))
        elif not texts:
            raise ParseError("unpaired", f"text before the first label: {text[:80]!r}")
        else:
            texts[-1] = (texts[-1][0], one_line(f"{texts[-1][1]} {text}"))
    return texts


def _label(line: str) -> tuple[str, str]:
    """Return a line's label ("q", "s", or "" if the line has no label), and the text without the label."""
    plain = _strip_decoration(line)
    match = _LABEL.match(plain)
    if not match:
        return "", one_line(plain)
    return ("q" if match["question"] else "s"), one_line(plain[match.end() :])


def _strip_decoration(line: str) -> str:
    match = _BULLET.match(line)
    assert match  # always true, because both parts of the pattern are optional
    line = (match["bold"] or "") + line[match.end() :]
    return line[number.end() :] if (number := _NUMBER.match(line)) else line
