"""Parse a generated solution into steps. A step has a sub-question, calculations and a value.

A generated text has the format of the training data: one sub-question or one solution per line, then `#### answer` as the
last line. Sub-questions and solutions alternate, or there are only solutions.
"""

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
# A calculation without annotation: "3 + 4 = 7" or "$3 x 4 = $12". A match does not begin inside a number or a word.
_PLAIN = re.compile(rf"(?<![\w.,])(-?{_NUMBER}(?:\s*[-+*/×÷−x]\s*{_NUMBER})+)\s*=\s*(-?[$]?\d[\d,]*\.?\d*)")


@dataclass(frozen=True)
class Equation:
    """A calculation `expression = result` as written.

    `computed` is the value of the expression, None if the expression is not arithmetic. `stated` is the value of the
    written result, None if the result is not a number.
    """

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
class SolutionStep:
    """One step. `question` and `solution` may be ""."""

    question: str
    solution: str

    @cached_property
    def equations(self) -> list[Equation]:
        """Return the annotated calculations (`<<3*4=12>>`), or the plain ones (`3*4 = 12`) if none is annotated."""
        annotated = [Equation(*groups) for groups in _ANNOTATION.findall(self.solution)]
        return annotated or [
            Equation(left.replace("$", "").replace("x", "*"), right)
            for left, right in _PLAIN.findall(self.solution)
        ]

    @property
    def computed(self) -> list[bool]:
        """Return for each annotation whether its result equals the calculator's result, character by character."""
        annotations = _ANNOTATION.findall(self.solution)
        return [calculator.evaluate(expression) == result for expression, result in annotations]

    @cached_property
    def value(self) -> Fraction | None:
        """Return the last equation's result. If there is no equation, return the solution's last number, or None."""
        if self.equations:
            return self.equations[-1].stated
        number = answers.extract_answer(self.solution, "flexible", "number")
        return None if number is None else answers.parse_number(number)


@dataclass(frozen=True)
class Solution:
    """Steps of a text. `ending`: the last `####` and the rest of its line; "" if the text has no `####`."""

    steps: tuple[SolutionStep, ...]
    ending: str


def parse(text: str, mode: str) -> Solution:
    """Split a generated text into steps. The steps end at the first delimiter.

    In a `mode` with sub-questions, lines alternate between sub-question and solution. If a line is missing, two rules
    restore the order: a line that ends with a question mark and has no annotation is a sub-question, and a line with an
    annotation and no question mark at its end is a solution. A few-shot answer is split in the same way if the first
    rule holds for one of its lines.
    """
    head, mark, _ = text.partition(DELIMITER)
    lines = [line.strip() for line in head.split("\n") if line.strip()]
    ending = DELIMITER + text.rpartition(DELIMITER)[2].partition("\n")[0] if mark else ""
    with_questions = mode in WITH_QUESTIONS or (mode == "few_shot" and any(map(_is_question, lines)))
    steps = _alternating(lines) if with_questions else [SolutionStep("", line) for line in lines]
    return Solution(tuple(steps), ending)


def _alternating(lines: Iterable[str]) -> list[SolutionStep]:
    steps = []
    question = ""
    for line in lines:
        if question and not _is_question(line):
            steps.append(SolutionStep(question, line))
            question = ""
        elif not question and "<<" in line and not line.endswith("?"):
            steps.append(SolutionStep("", line))
        else:
            if question:
                steps.append(SolutionStep(question, ""))
            question = line
    return [*steps, SolutionStep(question, "")] if question else steps


def _is_question(line: str) -> bool:
    return line.endswith("?") and "<<" not in line
