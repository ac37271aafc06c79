"""Error types of wrong answers, by the first step that differs from the gold solution.

Every wrong prediction (under the strict rule) has exactly one type:

- `no_answer`: there is no `####`, or nothing after the last one. Checked first, whatever the steps are.
- else the steps are compared with the gold steps in order. A step is right if it has the value of the gold step
  (`StepText.value`), whatever its words. The value of a later gold step is right too if the step has as many
  operations as the gold steps it joins, and so is an intermediate result of a gold step of several calculations. At
  the first step that is not right, in the order in which a step is written:
  - `subquestion`: another sub-question (only for models that write the sub-questions).
  - `operation`: the expression has no value of the gold step (another operation or operand), or there is a step
    too many or too few and the model does not write sub-questions.
  - `arithmetic`: the expression has a value of the gold step, the result written after it is another. With the
    calculator this is only possible in a calculation without annotation. A right expression shows that the sub-question
    was understood, so this is checked before the wording of the sub-question.
  Too many or too few steps, all others being right, are a wrong `subquestion` if the model writes sub-questions.
- `other`: none of this can be determined: an answer without steps; no expression; gold steps without values; or every
  step is right and the final answer is still another.

Sub-questions are compared by their words, not by their meaning: they differ if their numbers or the names in them
differ, or if they share less than half of the content words (Dice's coefficient). A good question that is
worded differently counts as wrong only if its step is wrong too, so the border between `subquestion` and `operation`
is rough.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from fractions import Fraction

import pandas as pd

from trainer.report import columns
from trainer.report.methods import WRITE_QUESTIONS, without_guidance
from trainer.report.run_files import read_predictions
from trainer.report.solution_steps import Solution, StepText, parse
from trainer.report.subquestions import Scorer, score_questions

RIGHT = "right"
ERROR_TYPES = ("subquestion", "operation", "arithmetic", "no_answer", "other")
LABELS = {
    "right": "right",
    "subquestion": "wrong sub-question",
    "operation": "wrong operation or operand",
    "arithmetic": "wrong arithmetic",
    "no_answer": "no answer",
    "other": "cannot be told",
}
_LARGE = ["question", "gold", "gold_steps", "text", "solution"]  # kept only of predictions that are shown
_SHARED_WORDS = 0.5
_DECIMALS = range(2, 6)
_OPERATOR = re.compile(r"(?<=[\d) ])[-+*/×÷−]")
_WORD = re.compile(r"\d[\d,]*(?:\.\d+)?|[^\W\d_]+(?:['’][^\W\d_]+)?")
_STOP_WORDS = frozenset((
    "a", "an", "the", "of", "to", "in", "on", "at", "for", "by", "with", "from", "and", "or", "if", "as",
    "than", "is", "are", "was", "were", "be", "been", "do", "does", "did", "has", "have", "had", "how",
    "many", "much", "what", "which", "who", "when", "where", "why", "will", "would", "can", "could",
    "should", "it", "its", "it's", "they", "them", "their", "he", "him", "his", "she", "her", "i", "you",
    "we", "there", "that", "this", "these", "those", "each",
))  # fmt: skip


def analyse(
    evaluations: pd.DataFrame, max_examples: int = 0, scorer: Scorer | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return all predictions with their error types, and the quality of the sub-questions by evaluation.

    The first frame has columns.PREDICTIONS and columns.ANALYSED. `max_examples` predictions in all are shown, an equal
    number per evaluation: the same problems in every evaluation of the same problems, chosen by a digest of their ids.
    The second frame has the column evaluation and those of score_questions, for evaluations whose models write sub-questions.
    Raises UserError for damaged predictions.
    """
    quota = max_examples // max(len(evaluations), 1)
    scorer = scorer or Scorer()
    frames = [columns.frame([], columns.PREDICTIONS | columns.ANALYSED)]
    qualities = []
    for number, row in enumerate(columns.records(evaluations)):
        predictions = read_predictions(row["predictions_path"], row)
        if predictions is None:
            continue
        shown = set(sorted(predictions["id"], key=_digest)[:quota])
        solutions = [parse(text, row["mode"]) for text in predictions["text"]]
        predictions = predictions.assign(
            evaluation=number,
            problem=(predictions["question"] + "\0" + predictions["gold"]).map(_digest),
            is_shown=predictions["id"].isin(shown),
            solution=pd.Series(solutions, dtype=object),
            error_type=None,
            wrong_step=pd.NA,
        )
        if predictions["gold_steps"].notna().all():
            errors = [
                find_error(found.solution, found.correct, found.has_answer, row["method"], found.gold_steps)
                for found in predictions.itertuples()
            ]
            predictions["error_type"], predictions["wrong_step"] = zip(*errors, strict=True)
            if without_guidance(row["method"]) in WRITE_QUESTIONS:
                pairs = zip(solutions, predictions["gold_steps"], strict=True)
                questions = [(_questions(solution.steps), _questions(gold)) for solution, gold in pairs]
                quality = score_questions(questions, scorer)
                qualities += [{"evaluation": number, **quality}] if quality else []
        predictions[_LARGE] = predictions[_LARGE].where(predictions["is_shown"], None)
        frames.append(predictions.astype({"error_type": "object", "wrong_step": "Int64"}))
    return pd.concat(frames, ignore_index=True), pd.DataFrame(qualities)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _questions(steps: Sequence[StepText]) -> list[str]:
    return [step.question for step in steps if step.question]


def find_error(
    solution: Solution, correct: bool, has_answer: bool, method: str, gold: Sequence[StepText]
) -> tuple[str, int | None]:
    """Return the error type of one prediction and the index of the first step that is not right (None without one).

    `has_answer`: whether the strict rule found an answer.
    """
    if correct:
        return RIGHT, None
    index, matched = _first_difference(solution.steps, gold)
    if not has_answer:
        return "no_answer", index
    writes_questions = without_guidance(method) in WRITE_QUESTIONS or (
        method == "few_shot" and any(step.question for step in solution.steps)
    )
    if not solution.steps or not any(step.value is not None or step.question for step in gold):
        return "other", None
    miscounted = "subquestion" if writes_questions else "operation"
    if index is None:  # all steps are right
        return (miscounted, len(solution.steps)) if matched < len(gold) else ("other", None)
    if matched == len(gold):
        return miscounted, index
    return _error_of_step(solution.steps[index], gold[matched], writes_questions), index


def same_question(ours: str, gold: str) -> bool:
    """Return whether two sub-questions are the same by their words (module docstring)."""
    return (
        _numbers(ours) == _numbers(gold)
        and _names(ours, gold) == _names(gold, ours)
        and _shared(_content_words(ours), _content_words(gold)) >= _SHARED_WORDS
    )


def _first_difference(steps: Sequence[StepText], gold: Sequence[StepText]) -> tuple[int | None, int]:
    """Return the index of the first step that is not right (None if all are), and the number of gold steps matched before it.

    Gold steps without a value (sub-questions alone) are compared by the sub-question.
    """
    matched = 0
    for index, step in enumerate(steps):
        if matched < len(gold) and gold[matched].value is None:
            found = matched if same_question(step.question, gold[matched].question) else None
        else:
            found = _matching_gold_step(step, gold, matched)
        if found is not None:
            matched = found + 1
        elif matched == len(gold) or step.value not in {e.stated for e in gold[matched].equations} - {None}:
            return index, matched
    return None, matched


def _matching_gold_step(step: StepText, gold: Sequence[StepText], begin: int) -> int | None:
    """Return the index of the first gold step, from `begin` on, with the same value as `step`; None if there is none.

    A step that equals gold step `begin + k` must have at least k + 1 operations. Otherwise the equal value is a
    coincidence: with the gold steps 3*4=12 and 12-5=7, the single step 3+4=7 does not count.
    """
    operations = sum(len(_OPERATOR.findall(equation.expression)) for equation in step.equations)
    for index in range(begin, len(gold) if step.value is not None else begin):
        value = gold[index].value
        if value is not None and _same(step.value, value) and (index == begin or operations > index - begin):
            return index
    return None


def _same(one: Fraction | None, other: Fraction) -> bool:
    """Return whether two results are equal, or one is the other with fewer decimals (0.33 for 0.333333)."""
    if one is None or one == other:
        return one == other
    return any(one == round(other, digits) or other == round(one, digits) for digits in _DECIMALS)


def _error_of_step(step: StepText, gold: StepText, writes_questions: bool) -> str:
    values = {gold.value, *(e.stated for e in gold.equations), *(e.computed for e in gold.equations)}
    other_expression = False
    for equation in step.equations:
        if equation.computed is None or equation.computed not in values:
            other_expression = True
            break
        if not _same(equation.stated, equation.computed):
            return "arithmetic"
    if writes_questions and gold.question and not same_question(step.question, gold.question):
        return "subquestion"
    if gold.value is None:
        return "other"
    # Without an expression, operation and arithmetic cannot be distinguished.
    return "operation" if other_expression or step.equations else "other"


def _numbers(question: str) -> set[str]:
    return {word.replace(",", "") for word in _WORD.findall(question) if word[0].isdigit()}


def _names(question: str, other: str) -> set[str]:
    """Return capitalised words that begin no sentence, and the first word if the other question has it as a name."""
    words = [(found.group(), found.start()) for found in _WORD.finditer(question)]
    names = {
        _stem(word) for word, start in words[1:] if word[0].isupper() and question[start - 2] not in ".?!"
    }
    elsewhere = {_stem(found) for found in _WORD.findall(other)[1:] if found[0].isupper()}
    first = {_stem(word) for word, _ in words[:1]} & elsewhere
    return (names | first) - _STOP_WORDS


def _content_words(question: str) -> set[str]:
    return {_stem(word) for word in _WORD.findall(question)} - _STOP_WORDS


def _stem(word: str) -> str:
    """Return a word in lower case, without a possessive or plural ending."""
    word = re.sub(r"['’]s?$", "", word.casefold())
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _shared(ours: set[str], gold: set[str]) -> float:
    return 2 * len(ours & gold) / (len(ours) + len(gold)) if ours or gold else 1.0
