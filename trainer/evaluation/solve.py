"""The methods of solving, each a generator that reads as what happens (see solution.py).

*Unified*: one model writes everything, an answer, a chain of thought, or sub-questions and their solutions. *Iterative*:
a decomposer asks, a solver answers, in turn or after all questions are asked. *Gold*: the solver is asked the
sub-questions of the data. A sub-question and a solution are one line each; a line ends with the first token whose text
holds a line break. When the decomposer writes `####` instead of another sub-question the solver is given it and writes
the answer. The two models are Shridhar, Stolfo and Sachan's (Findings of ACL 2023).

Lines 0, 2, 4, ... of the text are sub-questions, each followed by its solution, then `#### answer`, as in training. All
that can go otherwise is bounded, and recorded as the solution's `stopped`:

    max_steps       the decomposer wanted to ask more than that; the question is not asked, and the solver is given
                    `####` and answers with what there is
    ended_early     the decomposer ended its text, or wrote an empty line, instead of `####`: it has no more to ask, and
                    the solver answers; or a model ended its text within a line: the line ends there, and it goes on;
                    or the solver wrote `####` instead of a solution: that is the answer
    max_new_tokens, context     the limit of all models' tokens, or of one model's positions, is reached: the text is
                    cut; this outweighs the others
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from trainer.evaluation.decoding import DECOMPOSER, PLANNER, SOLVER, STUDENT
from trainer.evaluation.solution import Passage, Script, Solution
from trainer.problems.problem import DELIMITER
from trainer.shards.methods import Role

EARLY = "ended_early"

Method = Callable[[Solution], Script[None]]


def unified(solution: Solution, opening: str = "") -> Script[None]:
    """The student writes until it ends its text. `opening`: what it is made to begin with."""
    solution.lines = [opening]
    solution.feeds[solution.rules.voices[STUDENT]].pending += solution.rules.language.tokens(opening)

    def keep(text: str) -> None:
        solution.lines = [opening + text]

    passage = yield from solution.write(STUDENT, lambda tokens: False, keep, calculator=True)
    solution.finished = passage.ended_text


def few_shot(solution: Solution) -> Script[None]:
    """A model that goes on with the next exemplar if it is let: it writes until the line of its `#### answer` ends."""
    language = solution.rules.language

    def is_over(tokens: list[int]) -> bool:
        return tokens[-1] in language.newlines and DELIMITER in language.text(tokens)

    def keep(text: str) -> None:
        reasoning, delimiter, answer = text.partition(DELIMITER)
        solution.lines = [reasoning + delimiter + _one_line(answer)]

    yield from solution.write(STUDENT, is_over, keep, calculator=True)
    solution.finished = True


def interleaved(solution: Solution, max_steps: int, guidance: Method) -> Script[None]:
    """The decomposer asks the next sub-question with all the solutions so far before it."""
    yield from guidance(solution)
    step = 0
    while question := (yield from _asks(solution, step, max_steps)):
        solution.give(question.tokens, Role.SUBQUESTION, but=DECOMPOSER)
        if not (yield from _solves(solution, step)):
            return
        step += 1
    yield from _answers(solution)


def ahead(solution: Solution, max_steps: int, guidance: Method) -> Script[None]:
    """The decomposer asks everything before the solver begins."""
    yield from guidance(solution)
    questions: list[list[int]] = []
    while question := (yield from _asks(solution, len(questions), max_steps)):
        questions.append(question.tokens)
    yield from _solves_all(solution, questions)


def gold(solution: Solution, questions: Sequence[Sequence[int]]) -> Script[None]:
    """The solver is asked the sub-questions of the data, given as tokens."""
    for step, question in enumerate(questions):
        _put(solution, 2 * step, solution.rules.language.text(question))
    yield from _solves_all(solution, questions)


def without_guidance(solution: Solution) -> Script[None]:
    """Nobody tells the decomposer how the problem is solved."""
    yield from ()


def gold_guidance(solution: Solution, role: Role, tokens: Sequence[int]) -> Script[None]:
    """The decomposer reads the plan of the data, given as tokens; none if the data has none for this problem."""
    solution.plan = _one_line(solution.rules.language.text(tokens))
    solution.give(tokens, role)
    yield from ()


def planned_guidance(solution: Solution, role: Role) -> Script[None]:
    """A planner writes the plan that the decomposer reads."""

    def keep(text: str) -> None:
        solution.plan = _one_line(text)

    plan = yield from _line(solution, PLANNER, keep)
    solution.give(plan.tokens, role, but=PLANNER)
    solution.leave(PLANNER, staying=DECOMPOSER)


def _asks(solution: Solution, step: int, max_steps: int) -> Script[Passage | None]:
    """The decomposer writes its next sub-question; None if it has no more."""
    language, place = solution.rules.language, 2 * step

    def is_delimiter(tokens: list[int]) -> bool:
        return tokens[-1] in language.hashes and _is_delimiter(language.text(tokens))

    question = yield from _line(solution, DECOMPOSER, partial(_put, solution, place), is_delimiter)
    text = solution.lines[place]
    if text.strip() and not _is_delimiter(text) and step < max_steps:
        return question
    del solution.lines[place:]
    if not _is_delimiter(text):  # from here on it is as if it were one
        _otherwise(solution, "max_steps" if text.strip() else EARLY)
        own_seat = solution.rules.voices[DECOMPOSER]
        solution.feeds[own_seat].pending += language.tokens(DELIMITER)
    solution.leave(DECOMPOSER, staying=SOLVER)
    return None


def _solves(solution: Solution, step: int) -> Script[bool]:
    """The solver writes the solution of a step; False if that was the answer instead, and all is over."""
    place = 2 * step + 1
    passage = yield from _line(solution, SOLVER, partial(_put, solution, place), calculator=True)
    if _is_delimiter(solution.lines[place]):
        del solution.lines[place + 1 :]
        solution.finished = True
        _otherwise(solution, EARLY)
        return False
    solution.give(passage.tokens, Role.SOLUTION, but=SOLVER)
    return True


def _solves_all(solution: Solution, questions: Sequence[Sequence[int]]) -> Script[None]:
    for step, question in enumerate(questions):
        solution.give(question, Role.SUBQUESTION, but=DECOMPOSER)
        if not (yield from _solves(solution, step)):
            return
    yield from _answers(solution)


def _answers(solution: Solution) -> Script[None]:
    """The solver is given the delimiter, unless the decomposer wrote it into the same text, and writes the answer."""
    language = solution.rules.language
    solution.give(language.tokens(DELIMITER), Role.DELIMITER, but=DECOMPOSER)
    place = len(solution.lines)
    yield from solution.write(
        SOLVER,
        lambda tokens: tokens[-1] in language.newlines,
        lambda text: _put(solution, place, DELIMITER + text),
    )
    solution.finished = True


def _line(
    solution: Solution,
    voice: str,
    keep: Callable[[str], None],
    is_over: Callable[[list[int]], bool] = lambda tokens: False,
    calculator: bool = False,
) -> Script[Passage]:
    """A voice writes a line. Where it ends its text instead, it is made to end the line."""
    language = solution.rules.language
    passage = yield from solution.write(
        voice, lambda tokens: tokens[-1] in language.newlines or is_over(tokens), keep, calculator
    )
    if not passage.ended_text:
        return passage
    _otherwise(solution, EARLY)
    newline = language.tokens("\n")
    solution.feeds[solution.rules.voices[voice]].pending += newline
    return Passage([*passage.tokens, *newline], True)


def _otherwise(solution: Solution, what: str) -> None:
    solution.stopped = solution.stopped or what


def _put(solution: Solution, place: int, text: str) -> None:
    """Make `text` line `place`; lines before it that are not there yet are empty."""
    solution.lines += [""] * (place + 1 - len(solution.lines))
    solution.lines[place] = _one_line(text)


def _one_line(text: str) -> str:
    return text.partition("\n")[0]


def _is_delimiter(text: str) -> bool:
    return text.lstrip().startswith(DELIMITER)
