"""What went wrong in a wrong answer: the first place where it leaves the gold solution.

Every wrong prediction (under the strict rule) is in exactly one class:

- `no_answer`: there is no `####`, or nothing after the last one. Looked at first, whatever stands before.
- else the steps are compared with the gold steps in order. A step is right if it comes to the value of the gold
  step (`StepText.value`), however it is worded. The value of a later gold step is right too if the step
  has as many operations as the gold steps it does in one go, and so is a result on the way through a gold step of several calculations. At the first step that is not right, in the order in which a step is written:
  - `subquestion`: the student asked something else (only where it writes the sub-questions itself).
  - `operation`: the expression comes to no value of the gold step: another operation or operand; or the step is
    one too many (or the text ends a step too soon) in a mode where nobody asks a sub-question.
  - `arithmetic`: the expression comes to a value of the gold step, the result written behind it is another. With
    the calculator on this can only be a calculation without annotation. A right expression shows that the
    sub-question was understood, so this is looked at before the wording of the sub-question.
  Too many or too few steps, all others being right, are a wrong `subquestion` where the student asks.
- `other`: nothing of this can be told: an answer without steps; no expression to look at; gold steps without
  values; or every step is right and the final answer is still another.

Sub-questions are compared by their words, not by what they mean: they differ if their numbers or the names in them
differ, or if they share less than half of the words that carry meaning (Dice's coefficient). A good question that is
worded differently counts as wrong only if its step went wrong too, and then may be blamed for what was a wrong
operation. So the border between `subquestion` and `operation` is rough.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from trainer.report.methods import ASK, base
from trainer.report.steps import Solution, StepText

RIGHT = "right"
CAUSES = ("subquestion", "operation", "arithmetic", "no_answer", "other")
LABELS = {
    "right": "right",
    "subquestion": "wrong sub-question",
    "operation": "wrong operation or operand",
    "arithmetic": "wrong arithmetic",
    "no_answer": "no answer",
    "other": "cannot be told",
}
_SHARED_WORDS = 0.5
_DECIMALS = range(2, 6)
_OPERATOR = re.compile(r"(?<=[\d) ])[-+*/×÷−]")
_WORD = re.compile(r"\d[\d,]*(?:\.\d+)?|[^\W\d_]+(?:['’][^\W\d_]+)?")
_EMPTY_WORDS = """
a an the of to in on at for by with from and or if as than is are was were be been do does did has have had how many
much what which who when where why will would can could should it its it's they them their he him his she her i you we
there that this these those each
"""
_WITHOUT_MEANING = frozenset(_EMPTY_WORDS.split())


@dataclass(frozen=True)
class Finding:
    """`cause` is one of CAUSES or RIGHT; `step` is the index of the first step that is not right, None without one."""

    cause: str
    step: int | None = None


def find_cause(
    solution: Solution, correct: bool, answered: bool, method: str, gold: Sequence[StepText]
) -> Finding:
    """The class of one prediction. `answered`: whether the strict rule found an answer."""
    if correct:
        return Finding(RIGHT)
    if not answered:
        return Finding("no_answer", _first_difference(solution.steps, gold)[0])
    asks = base(method) in ASK or (method == "few_shot" and any(step.question for step in solution.steps))
    index, matched = _first_difference(solution.steps, gold)
    if not solution.steps or not any(step.value is not None or step.question for step in gold):
        return Finding("other")
    miscounted = "subquestion" if asks else "operation"
    if index is None:  # right as far as it goes
        return Finding(miscounted, len(solution.steps)) if matched < len(gold) else Finding("other")
    if matched == len(gold):
        return Finding(miscounted, index)
    return Finding(_cause_of_step(solution.steps[index], gold[matched], asks), index)


def same_question(ours: str, gold: str) -> bool:
    """Whether two sub-questions are the same by their words; see the top of this file."""
    return (
        _numbers(ours) == _numbers(gold)
        and _names(ours, gold) == _names(gold, ours)
        and _shared(_content(ours), _content(gold)) >= _SHARED_WORDS
    )


def _first_difference(steps: Sequence[StepText], gold: Sequence[StepText]) -> tuple[int | None, int]:
    """Index of the first step that is not right, None if all are, and how many gold steps were done before it.

    Gold steps without a value (sub-questions alone) are compared by the sub-question.
    """
    matched = 0
    for index, step in enumerate(steps):
        if matched < len(gold) and gold[matched].value is None:
            found = matched if same_question(step.question, gold[matched].question) else None
        else:
            found = _done(step, gold, matched)
        if found is not None:
            matched = found + 1
        elif matched == len(gold) or step.value not in {e.stated for e in gold[matched].equations} - {None}:
            return index, matched
    return None, matched


def _done(step: StepText, gold: Sequence[StepText], begin: int) -> int | None:
    """Index of the gold step that a step comes to, from `begin` on; None if to none.

    For a later one than `begin` it must have at least as many operations as there are gold steps in it: 3+4 is 7 only
    by chance where gold has 3*4, then 12-5.
    """
    operations = sum(len(_OPERATOR.findall(equation.expression)) for equation in step.equations)
    for index in range(begin, len(gold) if step.value is not None else begin):
        value = gold[index].value
        if value is not None and _same(step.value, value) and (index == begin or operations > index - begin):
            return index
    return None


def _same(one: Fraction | None, other: Fraction) -> bool:
    """Whether two results are equal, or one is the other written to fewer decimals (0.33 for 0.333333)."""
    if one is None or one == other:
        return one == other
    return any(one == round(other, digits) or other == round(one, digits) for digits in _DECIMALS)


def _cause_of_step(step: StepText, gold: StepText, asks: bool) -> str:
    values = {equation.stated for equation in gold.equations} | {gold.value}
    values |= {equation.computed for equation in gold.equations}
    other_expression = False
    for equation in step.equations:
        if equation.computed is None or equation.computed not in values:
            other_expression = True
            break
        if not _same(equation.stated, equation.computed):
            return "arithmetic"
    if asks and gold.question and not same_question(step.question, gold.question):
        return "subquestion"
    if gold.value is None:
        return "other"
    # Without an expression there is nothing to tell an operation from arithmetic by.
    return "operation" if other_expression or step.equations else "other"


def _numbers(question: str) -> set[str]:
    return {word.replace(",", "") for word in _WORD.findall(question) if word[0].isdigit()}


def _names(question: str, other: str) -> set[str]:
    """Capitalised words that are not the first of a sentence, and the first if the other question has it as a name."""
    words = [(found.group(), found.start()) for found in _WORD.finditer(question)]
    names = {
        _stem(word) for word, start in words[1:] if word[0].isupper() and question[start - 2] not in ".?!"
    }
    elsewhere = {_stem(found) for found in _WORD.findall(other)[1:] if found[0].isupper()}
    first = {_stem(word) for word, _ in words[:1]} & elsewhere
    return (names | first) - _WITHOUT_MEANING


def _content(question: str) -> set[str]:
    return {_stem(word) for word in _WORD.findall(question)} - _WITHOUT_MEANING


def _stem(word: str) -> str:
    """Lower case, without a possessive or plural ending: enough to make apple of apples."""
    word = re.sub(r"['’]s?$", "", word.casefold())
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _shared(ours: set[str], gold: set[str]) -> float:
    return 2 * len(ours & gold) / (len(ours) + len(gold)) if ours or gold else 1.0
