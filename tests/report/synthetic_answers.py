"""Answers to stories in a synthetic study: right, or with one planted mistake of a known type."""

from __future__ import annotations

import functools
import re

from trainer.problems import calculator, stories
from trainer.problems.problem import Problem, Step
from trainer.report.methods import WITH_QUESTIONS, WRITE_QUESTIONS

MISTAKES = ("subquestion", "copying", "operation", "arithmetic", "no_answer", "other")
_LAST_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>(?!.*<<)")


@functools.cache
def problems(num: int, min_steps: int = 2, max_steps: int = 5) -> list[Problem]:
    """Return stories with a number of steps in this range."""
    about = {"num_problems": num, "min_steps": min_steps, "max_steps": max_steps}
    return list(stories.generate_problems("test", seed=7, **about))


def possible_mistakes(mode: str) -> tuple[str, ...]:
    """Return the mistakes that can be distinguished in an answer of this mode."""
    if mode == "answer_only":
        return ("no_answer", "other")
    return tuple(mistake for mistake in MISTAKES if mistake != "subquestion" or mode in WRITE_QUESTIONS)


def answer(problem: Problem, mode: str, mistake: str = "", at: int = 0) -> str:
    """Return the text of one answer; `mistake` is "" or one of MISTAKES, planted in step `at`."""
    steps = list(problem.steps)
    final = problem.answer
    if mistake == "other":
        final = str(int(float(final)) + 1001)
    elif mistake in ("subquestion", "copying", "operation", "arithmetic"):
        steps[at] = _spoilt(steps[at], mistake)
        final = str(int(float(final)) + 1000)
    lines = []
    for step in steps if mode != "answer_only" else []:
        lines += [step.question] * (mode in WITH_QUESTIONS) + [step.solution]
    if mistake == "no_answer":
        return "\n".join(lines) or "eeeee"
    return "\n".join([*lines, f"#### {final}"])


def _spoilt(step: Step, mistake: str) -> Step:
    found = _LAST_ANNOTATION.search(step.solution)
    assert found is not None, step
    expression, result = found.groups()
    if mistake == "arithmetic":
        result = str(int(float(result)) + 1000)
    else:
        if mistake == "operation":  # the same numbers, and one operator more
            expression += "*" + expression.rstrip("0123456789").rstrip("+-*/")
        else:  # a number from nowhere
            expression = re.sub(r"\d+$", "1003", expression)
        result = calculator.evaluate(expression) or ""
    solution = step.solution[: found.start()] + f"<<{expression}={result}>>{result} in all."
    return Step("How far is the moon from Paris?" if mistake == "subquestion" else step.question, solution)
