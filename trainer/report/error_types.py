"""Error types of wrong answers, by the first step that differs from the gold solution.

Every wrong prediction (under the strict rule) has exactly one type:

- `no_answer`: the text has no `####`, or no text follows the last `####`. The steps do not matter.
- Otherwise the steps are compared with the gold steps in order. A step is right if its value (`SolutionStep.value`) is
  the value of the gold step. The words of the step are ignored. A step may join n gold steps. It is then right if it
  has the value of the last joined gold step and at least n operations. A step with an intermediate result of a gold
  step is right, too. The first step that is not right decides the type:
  - `arithmetic`: the expression evaluates to a value of the gold step, but the written result differs. If the
    calculator writes the results of annotations, only expressions without annotation can have this error. This type
    is checked before `subquestion`, because a right expression shows that the sub-question is not the cause.
  - `subquestion`: the sub-question differs from the gold one. Only models that write sub-questions have this type.
  - `copying`: the expression does not evaluate to a value of the gold step, and a number in it was not copied rightly. Either
    the number occurs neither in the problem (in digits or as one of a few words, e.g. three, twice, half), nor in an
    expression or result of an earlier step, nor in the gold step; or the operators are those of the gold step, in the same
    order, and only the numbers differ.
  - `operation`: the expression does not evaluate to a value of the gold step, and its numbers were available. The operators
    differ, or there are more or fewer of them, or the numbers are those of the gold step in another order.
  If the only fault is that steps are missing or superfluous, the type is `subquestion` for models that write
  sub-questions, else `operation`.
- `other`: the cause cannot be told, because the answer has no steps, the wrong step has no expression, the gold
  step has no value, or every step is right and only the final answer is wrong.

Sub-questions are compared by their words, not by their meaning. Two sub-questions differ if their numbers or names
differ, or if Dice's coefficient of their content words is below 0.5. So a good but differently worded sub-question
may count as different. A wrong step with such a sub-question has type `subquestion`, although `copying` or `operation` would
be right.
"""

import hashlib
import re
from collections.abc import Sequence
from fractions import Fraction

import pandas as pd

from trainer.report import columns
from trainer.report.methods import WRITE_QUESTIONS, without_guidance
from trainer.report.run_files import read_predictions
from trainer.report.solution_steps import Equation, Solution, SolutionStep, parse
from trainer.report.subquestions import Scorer, score_questions

LABELS = {
    "right": "right",
    "subquestion": "wrong sub-question",
    "copying": "wrong number copied",
    "operation": "wrong operation",
    "arithmetic": "wrong arithmetic",
    "no_answer": "no answer",
    "other": "cannot be told",
}
RIGHT, *ERROR_TYPES = LABELS
# Columns that are set to None if the page does not show the prediction.
_LARGE = ["question", "gold", "gold_steps", "text", "solution"]
_SHARED_WORDS = 0.5  # sub-questions with a smaller Dice coefficient of their words count as different
_DECIMALS = range(2, 6)  # a result may be rounded to 2, 3, 4 or 5 decimal places
_OPERATOR = re.compile(r"(?<=[\d) ])[-+*/×÷−]")
_SAME_OPERATORS = str.maketrans("×÷−", "*/-")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")
# Numbers that problems write as words.
_ONE_TO_TWELVE = (
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
_NUMBER_WORDS = {word: number for number, word in enumerate(_ONE_TO_TWELVE, 1)}
_NUMBER_WORDS |= {"once": 1, "twice": 2, "double": 2, "half": 2, "triple": 3, "thrice": 3, "quarter": 4, "dozen": 12, "percent": 100}  # fmt: skip
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
    """Return a frame of all predictions with their error types, and a frame of the quality of the sub-questions.

    The first frame has columns.PREDICTIONS and columns.ANALYSED. `is_shown` selects the same number of predictions of each
    evaluation, in total at most `max_examples`. It selects the problem ids with the smallest digests, so that evaluations
    on the same problems show the same ids. The second frame has a row for each evaluation whose models write sub-questions.
    The columns of the second frame are `evaluation` and the keys of score_questions. An evaluation without gold steps has
    no error types and no row. Raises UserError if a file of predictions is damaged.
    """
    quota = max_examples // max(len(evaluations), 1)
    scorer = scorer or Scorer()
    frames = [columns.frame([], columns.PREDICTIONS | columns.ANALYSED)]
    qualities = []
    for number, row in enumerate(columns.to_dicts(evaluations)):
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
        method = row["method"]
        if predictions["gold_steps"].notna().all():
            errors = [
                find_error(
                    answer.solution,
                    answer.correct,
                    answer.has_answer,
                    method,
                    answer.gold_steps,
                    answer.question,
                )
                for answer in predictions.itertuples()
            ]
            predictions["error_type"], predictions["wrong_step"] = zip(*errors, strict=True)
            if without_guidance(method) in WRITE_QUESTIONS:
                pairs = zip(solutions, predictions["gold_steps"], strict=True)
                questions = [(_questions(solution.steps), _questions(gold)) for solution, gold in pairs]
                quality = score_questions(questions, scorer)
                qualities += [{"evaluation": number, **quality}] if quality else []
        predictions[_LARGE] = predictions[_LARGE].where(predictions["is_shown"], None)
        frames.append(predictions.astype({"error_type": "object", "wrong_step": "Int64"}))
    return pd.concat(frames, ignore_index=True), pd.DataFrame(qualities)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _questions(steps: Sequence[SolutionStep]) -> list[str]:
    return [step.question for step in steps if step.question]


def find_error(
    solution: Solution,
    correct: bool,
    has_answer: bool,
    method: str,
    gold: Sequence[SolutionStep],
    problem: str,
) -> tuple[str, int | None]:
    """Return the error type of a prediction, and the index of the first step that is not right (or None).

    If the only fault is missing steps, the index is len(solution.steps). `has_answer`: the strict rule found an answer.
    `problem`: the text of the problem.
    """
    if correct:
        return RIGHT, None
    index, matched = _first_difference(solution.steps, gold)
    if not has_answer:
        return "no_answer", index
    has_questions = any(step.question for step in solution.steps)
    writes_questions = without_guidance(method) in WRITE_QUESTIONS or (method == "few_shot" and has_questions)
    if not solution.steps or not any(step.value is not None or step.question for step in gold):
        return "other", None
    miscounted = "subquestion" if writes_questions else "operation"
    if index is None:  # all steps are right
        return (miscounted, len(solution.steps)) if matched < len(gold) else ("other", None)
    if matched == len(gold):
        return miscounted, index
    earlier = [equation for step in solution.steps[:index] for equation in step.equations]
    available = _numbers_in(problem).union(*(_numbers_in(f"{e.expression} {e.result}") for e in earlier))
    return _error_of_step(solution.steps[index], gold[matched], writes_questions, available), index


def same_question(ours: str, gold: str) -> bool:
    """Return whether two sub-questions are the same by the rules of the module docstring."""
    our_words, gold_words = (
        {_stem(word) for word in _WORD.findall(text)} - _STOP_WORDS for text in (ours, gold)
    )
    num_shared, num_words = len(our_words & gold_words), len(our_words) + len(gold_words)
    return (
        _numbers(ours) == _numbers(gold)
        and _names(ours, gold) == _names(gold, ours)
        and 2 * num_shared >= _SHARED_WORDS * num_words
    )


def _first_difference(steps: Sequence[SolutionStep], gold: Sequence[SolutionStep]) -> tuple[int | None, int]:
    """Return the index of the first step that is not right, and the number of gold steps that earlier steps match.

    The index is None if all steps are right. A gold step without a value is compared by its sub-question.
    """
    matched = 0
    for index, step in enumerate(steps):
        if matched < len(gold) and gold[matched].value is None:
            match = matched if same_question(step.question, gold[matched].question) else None
        else:
            match = _matching_gold_step(step, gold, matched)
        if match is not None:
            matched = match + 1
        elif matched == len(gold) or step.value not in {e.stated for e in gold[matched].equations} - {None}:
            return index, matched
    return None, matched


def _matching_gold_step(step: SolutionStep, gold: Sequence[SolutionStep], begin: int) -> int | None:
    """Return the index of the first gold step from `begin` on that has the value of `step`, or None.

    A match with gold step `begin + k` (k > 0) requires that `step` has at least k + 1 operations. With fewer
    operations, the equal value is a coincidence: for the gold steps 3*4=12 and 12-5=7, the step 3+4=7 does not match.
    """
    operations = sum(len(_OPERATOR.findall(equation.expression)) for equation in step.equations)
    for index in range(begin, len(gold) if step.value is not None else begin):
        value = gold[index].value
        if value is not None and _same(step.value, value) and (index == begin or operations > index - begin):
            return index
    return None


def _same(first: Fraction | None, second: Fraction) -> bool:
    """Return whether two results are equal, or become equal if one of them is rounded (0.33 and 0.333333)."""
    if first is None or first == second:
        return first == second
    return any(first == round(second, digits) or second == round(first, digits) for digits in _DECIMALS)


def _error_of_step(
    step: SolutionStep, gold: SolutionStep, writes_questions: bool, available: set[Fraction]
) -> str:
    """Return the type of a wrong step. `available`: the numbers in the problem and in earlier steps."""
    values = {gold.value, *(e.stated for e in gold.equations), *(e.computed for e in gold.equations)}
    for equation in step.equations:
        if equation.computed is None or equation.computed not in values:
            break
        if not _same(equation.stated, equation.computed):
            return "arithmetic"
    if writes_questions and gold.question and not same_question(step.question, gold.question):
        return "subquestion"
    if gold.value is None:
        return "other"
    # Without an expression, a wrong operation and wrong arithmetic cannot be distinguished.
    if not step.equations:
        return "other"
    wrong = next((e for e in step.equations if e.computed not in values), step.equations[-1])
    available = available.union(*(_numbers_in(e.expression) for e in (*gold.equations, *step.equations[:-1])))
    if not _numbers_in(wrong.expression) <= available:
        return "copying"
    differs_in_numbers = any(
        _operators(wrong) == _operators(e) and _numbers_in(wrong.expression) != _numbers_in(e.expression)
        for e in gold.equations
    )
    return "copying" if differs_in_numbers else "operation"


def _operators(equation: Equation) -> list[str]:
    return _OPERATOR.findall(equation.expression.translate(_SAME_OPERATORS))


def _numbers_in(text: str) -> set[Fraction]:
    """Return the numbers in a text, without signs."""
    words = {
        Fraction(_NUMBER_WORDS[word]) for word in re.findall(r"[a-z]+", text.lower()) if word in _NUMBER_WORDS
    }
    return words | {Fraction(number.replace(",", "")) for number in _NUMBER.findall(text)}


def _numbers(question: str) -> set[str]:
    return {word.replace(",", "") for word in _WORD.findall(question) if word[0].isdigit()}


def _names(question: str, other: str) -> set[str]:
    """Return the names in a question: its capitalised words, except words that begin a sentence.

    The question's first word is also a name if it occurs, capitalised but not first, in `other` (the compared question).
    """
    words = [(match.group(), match.start()) for match in _WORD.finditer(question)]
    names = {
        _stem(word) for word, start in words[1:] if word[0].isupper() and question[start - 2] not in ".?!"
    }
    elsewhere = {_stem(word) for word in _WORD.findall(other)[1:] if word[0].isupper()}
    first = {_stem(word) for word, _ in words[:1]} & elsewhere
    return (names | first) - _STOP_WORDS


def _stem(word: str) -> str:
    """Return a word in lower case, without a possessive or plural ending."""
    word = re.sub(r"['’]s?$", "", word.casefold())
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
