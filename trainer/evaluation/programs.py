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
from trainer.evaluation.rollout import Completion, Program, Rollout
from trainer.problems.problem import DELIMITER
from trainer.shards.methods import Role

ENDED_EARLY = "ended_early"

SolvingProgram = Callable[[Rollout], Program[None]]


def unified(solution: Rollout, opening: str = "") -> Program[None]:
    """The student writes until it ends its text. `opening`: what it is made to begin with."""
    solution.lines = [opening]
    solution.sequences[solution.context.roles[STUDENT]].pending += solution.context.stop_tokens.tokens(
        opening
    )

    def keep(text: str) -> None:
        solution.lines = [opening + text]

    passage = yield from solution.generate(STUDENT, lambda tokens: False, keep, calculator=True)
    solution.finished = passage.is_end_of_text


def few_shot(solution: Rollout) -> Program[None]:
    """A model that goes on with the next exemplar if it is let: it writes until the line of its `#### answer` ends."""
    language = solution.context.stop_tokens

    def is_over(tokens: list[int]) -> bool:
        return tokens[-1] in language.newlines and DELIMITER in language.text(tokens)

    def keep(text: str) -> None:
        reasoning, delimiter, answer = text.partition(DELIMITER)
        solution.lines = [reasoning + delimiter + _one_line(answer)]

    yield from solution.generate(STUDENT, is_over, keep, calculator=True)
    solution.finished = True


def interleaved(solution: Rollout, max_steps: int, guidance: SolvingProgram) -> Program[None]:
    """The decomposer asks the next sub-question with all the solutions so far before it."""
    yield from guidance(solution)
    step = 0
    while question := (yield from _ask(solution, step, max_steps)):
        solution.append(question.tokens, Role.SUBQUESTION, but=DECOMPOSER)
        if not (yield from _solve_step(solution, step)):
            return
        step += 1
    yield from _answer(solution)


def ahead(solution: Rollout, max_steps: int, guidance: SolvingProgram) -> Program[None]:
    """The decomposer asks everything before the solver begins."""
    yield from guidance(solution)
    questions: list[list[int]] = []
    while question := (yield from _ask(solution, len(questions), max_steps)):
        questions.append(question.tokens)
    yield from _solve_all(solution, questions)


def gold_subquestions(solution: Rollout, questions: Sequence[Sequence[int]]) -> Program[None]:
    """The solver is asked the sub-questions of the data, given as tokens."""
    for step, question in enumerate(questions):
        _set_line(solution, 2 * step, solution.context.stop_tokens.text(question))
    yield from _solve_all(solution, questions)


def without_guidance(solution: Rollout) -> Program[None]:
    """Nobody tells the decomposer how the problem is solved."""
    yield from ()


def gold_guidance(solution: Rollout, role: Role, tokens: Sequence[int]) -> Program[None]:
    """The decomposer reads the plan of the data, given as tokens; none if the data has none for this problem."""
    solution.plan = _one_line(solution.context.stop_tokens.text(tokens))
    solution.append(tokens, role)
    yield from ()


def planner_guidance(solution: Rollout, role: Role) -> Program[None]:
    """A planner writes the plan that the decomposer reads."""

    def keep(text: str) -> None:
        solution.plan = _one_line(text)

    plan = yield from _generate_line(solution, PLANNER, keep)
    solution.append(plan.tokens, role, but=PLANNER)
    solution.release(PLANNER, staying=DECOMPOSER)


def _ask(solution: Rollout, step: int, max_steps: int) -> Program[Completion | None]:
    """The decomposer writes its next sub-question; None if it has no more."""
    language, place = solution.context.stop_tokens, 2 * step

    def is_delimiter(tokens: list[int]) -> bool:
        return tokens[-1] in language.hashes and _is_delimiter(language.text(tokens))

    question = yield from _generate_line(
        solution, DECOMPOSER, partial(_set_line, solution, place), is_delimiter
    )
    text = solution.lines[place]
    if text.strip() and not _is_delimiter(text) and step < max_steps:
        return question
    del solution.lines[place:]
    if not _is_delimiter(text):  # from here on it is as if it were one
        _set_stop_reason(solution, "max_steps" if text.strip() else ENDED_EARLY)
        own_seat = solution.context.roles[DECOMPOSER]
        solution.sequences[own_seat].pending += language.tokens(DELIMITER)
    solution.release(DECOMPOSER, staying=SOLVER)
    return None


def _solve_step(solution: Rollout, step: int) -> Program[bool]:
    """The solver writes the solution of a step; False if that was the answer instead, and all is over."""
    place = 2 * step + 1
    passage = yield from _generate_line(
        solution, SOLVER, partial(_set_line, solution, place), calculator=True
    )
    if _is_delimiter(solution.lines[place]):
        del solution.lines[place + 1 :]
        solution.finished = True
        _set_stop_reason(solution, ENDED_EARLY)
        return False
    solution.append(passage.tokens, Role.SOLUTION, but=SOLVER)
    return True


def _solve_all(solution: Rollout, questions: Sequence[Sequence[int]]) -> Program[None]:
    for step, question in enumerate(questions):
        solution.append(question, Role.SUBQUESTION, but=DECOMPOSER)
        if not (yield from _solve_step(solution, step)):
            return
    yield from _answer(solution)


def _answer(solution: Rollout) -> Program[None]:
    """The solver is given the delimiter, unless the decomposer wrote it into the same text, and writes the answer."""
    language = solution.context.stop_tokens
    solution.append(language.tokens(DELIMITER), Role.DELIMITER, but=DECOMPOSER)
    place = len(solution.lines)
    yield from solution.generate(
        SOLVER,
        lambda tokens: tokens[-1] in language.newlines,
        lambda text: _set_line(solution, place, DELIMITER + text),
    )
    solution.finished = True


def _generate_line(
    solution: Rollout,
    voice: str,
    keep: Callable[[str], None],
    is_over: Callable[[list[int]], bool] = lambda tokens: False,
    calculator: bool = False,
) -> Program[Completion]:
    """A voice writes a line. Where it ends its text instead, it is made to end the line."""
    language = solution.context.stop_tokens
    passage = yield from solution.generate(
        voice, lambda tokens: tokens[-1] in language.newlines or is_over(tokens), keep, calculator
    )
    if not passage.is_end_of_text:
        return passage
    _set_stop_reason(solution, ENDED_EARLY)
    newline = language.tokens("\n")
    solution.sequences[solution.context.roles[voice]].pending += newline
    return Completion([*passage.tokens, *newline], True)


def _set_stop_reason(solution: Rollout, what: str) -> None:
    solution.stop_reason = solution.stop_reason or what


def _set_line(solution: Rollout, place: int, text: str) -> None:
    """Make `text` line `place`; lines before it that are not there yet are empty."""
    solution.lines += [""] * (place + 1 - len(solution.lines))
    solution.lines[place] = _one_line(text)


def _one_line(text: str) -> str:
    return text.partition("\n")[0]


def _is_delimiter(text: str) -> bool:
    return text.lstrip().startswith(DELIMITER)
