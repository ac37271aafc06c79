"""Parse a written solution into steps: the sub-question, the calculations and the value of each.

Generated texts have the format of the training data, one segment per line: alternating sub-questions and solutions
(or solutions alone), then `#### answer`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from trainer.problems import answers, calculator
from trainer.problems.problem import DELIMITER
from trainer.report.methods import WITH_QUESTIONS

_ANNOTATION = re.compile(r"<<([^<>=\n]*)=([^<>\n]*)>>")
_NUMBER = r"[$(]*(?:\d[\d,]*\.?\d*|\.\d+)\)?"
# A calculation without annotation, "3 + 4 = 7" or "$3 x 4 = $12"; it does not begin inside a number or a word.
_PLAIN = re.compile(rf"(?<![\w.,])(-?{_NUMBER}(?:\s*[-+*/×÷−x]\s*{_NUMBER})+)\s*=\s*(-?[$]?\d[\d,]*\.?\d*)")


@dataclass(frozen=True)
class Equation:
    """`expression = result` as written. `computed` is the value of the expression, None if it is no arithmetic;
    `stated` is the written result, None if that is no number."""

    expression: str
    result: str

    @cached_property
    def computed(self) -> Fraction | None:
        text = calculator.evaluate(self.expression)
        return None if text is None else Fraction(text)

    @cached_property
    def stated(self) -> Fraction | None:
        return answers.parse_number(self.result)


@dataclass(frozen=True)
class StepText:
    """One step; either text may be ""."""

    question: str
    solution: str

    @cached_property
    def equations(self) -> list[Equation]:
        """Return the annotations `<<3*4=12>>`; where there is none, the plain calculations `3*4 = 12`."""
        annotated = [Equation(*found.groups()) for found in _ANNOTATION.finditer(self.solution)]
        return annotated or [
            Equation(left.replace("$", "").replace("x", "*"), right)
            for left, right in _PLAIN.findall(self.solution)
        ]

    @property
    def computed(self) -> list[bool]:
        """Return for each annotation whether its result equals the calculator's, character by character."""
        found = _ANNOTATION.findall(self.solution)
        return [calculator.evaluate(expression) == result for expression, result in found]

    @cached_property
    def value(self) -> Fraction | None:
        """Return the result of the last equation, else the last number; None without any."""
        if self.equations:
            return self.equations[-1].stated
        found = answers.extract_answer(self.solution, "flexible", "number")
        return None if found is None else answers.parse_number(found)


@dataclass(frozen=True)
class Solution:
    """A text in steps; `ending` is its last line with the delimiter, "" if there is none."""

    steps: tuple[StepText, ...]
    ending: str


def parse(text: str, mode: str) -> Solution:
    """Split a generated text into steps, up to its first delimiter.

    In a `mode` with sub-questions, lines alternate between sub-question and solution, except that a line with an
    annotation and without a question mark is a solution, and a line that ends with a question mark and has no
    annotation is a sub-question. So a missing line does not swap all later ones. A few-shot answer has
    sub-questions if any of its lines is one.
    """
    head, mark, _ = text.partition(DELIMITER)
    lines = [line.strip() for line in head.split("\n") if line.strip()]
    ending = DELIMITER + text.rpartition(DELIMITER)[2].partition("\n")[0] if mark else ""
    with_questions = mode in WITH_QUESTIONS or (mode == "few_shot" and any(map(_is_question, lines)))
    return Solution(
        tuple(_alternating(lines) if with_questions else (StepText("", s) for s in lines)), ending
    )


def _alternating(lines: Iterable[str]) -> list[StepText]:
    steps = []
    question = ""
    for line in lines:
        if question and not _is_question(line):
            steps.append(StepText(question, line))
            question = ""
        elif not question and "<<" in line and not line.endswith("?"):
            steps.append(StepText("", line))
        else:
            if question:
                steps.append(StepText(question, ""))
            question = line
    return [*steps, StepText(question, "")] if question else steps


def _is_question(line: str) -> bool:
    return line.endswith("?") and "<<" not in line
