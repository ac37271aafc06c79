"""Solving programs: generators that define which role generates next and which tokens each model reads (see rollout.py).

*Unified*: one model generates everything: an answer, a chain of thought, or sub-questions and their solutions.
*Iterative*: a decomposer generates sub-questions and a solver answers them, alternately or after all sub-questions.
*Gold*: the solver answers the data's sub-questions. A sub-question and a solution are one line each; a line ends with the
first token whose text contains a line break. A decomposer that generates `####` instead of a sub-question ends the
questions; the solver then reads `####` and generates the answer. The two models are those of Shridhar, Stolfo and Sachan
(Findings of ACL 2023).

Lines 0, 2, 4, ... of the text are sub-questions, each followed by its solution, then `#### answer`, as in training. The
values of `stop_reason`:

    max_steps       the decomposer generated one sub-question too many: it is dropped, and the solver reads `####`
    ended_early     the decomposer generated an end token or an empty line instead of `####`, which counts as `####`; or a
                    role generated an end token within a line, which counts as a line break; or the solver generated
                    `####` instead of a solution, which is taken as the answer
    max_new_tokens, context     a limit on all generated tokens, or on one model's positions, cut the text; this
                    overrides the others
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from trainer.evaluation.decoding import DECOMPOSER, PLANNER, SOLVER, STUDENT
from trainer.evaluation.rollout import Completion, Program, Rollout
from trainer.problems.problem import DELIMITER
from trainer.shards.methods import SegmentRole

ENDED_EARLY = "ended_early"

SolvingProgram = Callable[[Rollout], Program[None]]


def unified(rollout: Rollout, opening: str = "") -> Program[None]:
    """Generate until an end token. `opening`: text that the model's output is forced to start with."""
    rollout.lines = [opening]
    _append_for_role(rollout, STUDENT, opening)

    def set_text(text: str) -> None:
        rollout.lines = [opening + text]

    completion = yield from rollout.generate(STUDENT, lambda tokens: False, set_text, calculator=True)
    rollout.finished = completion.is_end_of_text


def few_shot(rollout: Rollout) -> Program[None]:
    """Generate until the line of `#### answer` ends; an undistilled model would continue with another exemplar."""
    stop_tokens = rollout.context.stop_tokens

    def is_done(tokens: list[int]) -> bool:
        return tokens[-1] in stop_tokens.newlines and DELIMITER in stop_tokens.text(tokens)

    def set_text(text: str) -> None:
        reasoning, delimiter, answer = text.partition(DELIMITER)
        rollout.lines = [reasoning + delimiter + _one_line(answer)]

    yield from rollout.generate(STUDENT, is_done, set_text, calculator=True)
    rollout.finished = True


def interleaved(rollout: Rollout, max_steps: int, guidance: SolvingProgram) -> Program[None]:
    """Alternate between the decomposer, which reads all solutions so far, and the solver."""
    yield from guidance(rollout)
    step = 0
    while question := (yield from _generate_question(rollout, step, max_steps)):
        rollout.append(question.tokens, SegmentRole.SUBQUESTION, excluding=DECOMPOSER)
        if not (yield from _solve_step(rollout, step)):
            return
        step += 1
    yield from _answer(rollout)


def ahead(rollout: Rollout, max_steps: int, guidance: SolvingProgram) -> Program[None]:
    """Generate all sub-questions, then solve them."""
    yield from guidance(rollout)
    questions: list[list[int]] = []
    while question := (yield from _generate_question(rollout, len(questions), max_steps)):
        questions.append(question.tokens)
    yield from _solve_all(rollout, questions)


def gold_subquestions(rollout: Rollout, questions: Sequence[Sequence[int]]) -> Program[None]:
    """Solve the data's sub-questions, given as tokens."""
    for step, question in enumerate(questions):
        _set_line(rollout, 2 * step, rollout.context.stop_tokens.text(question))
    yield from _solve_all(rollout, questions)


def without_guidance(rollout: Rollout) -> Program[None]:
    """Give the decomposer no plan."""
    yield from ()


def gold_guidance(rollout: Rollout, segment_role: SegmentRole, tokens: Sequence[int]) -> Program[None]:
    """Give the decomposer the data's plan, as tokens; none if the data has no plan for this problem."""
    rollout.guidance_text = _one_line(rollout.context.stop_tokens.text(tokens))
    rollout.append(tokens, segment_role)
    yield from ()


def planner_guidance(rollout: Rollout, segment_role: SegmentRole) -> Program[None]:
    """Generate a plan with the planner and give it to the decomposer."""

    def set_text(text: str) -> None:
        rollout.guidance_text = _one_line(text)

    plan = yield from _generate_line(rollout, PLANNER, set_text)
    rollout.append(plan.tokens, segment_role, excluding=PLANNER)
    rollout.release(PLANNER, unless_shared_with=DECOMPOSER)


def _generate_question(rollout: Rollout, step: int, max_steps: int) -> Program[Completion | None]:
    """Return the decomposer's next sub-question, None after the last."""
    stop_tokens, line = rollout.context.stop_tokens, 2 * step

    def is_delimiter(tokens: list[int]) -> bool:
        return tokens[-1] in stop_tokens.hashes and _is_delimiter(stop_tokens.text(tokens))

    question = yield from _generate_line(rollout, DECOMPOSER, partial(_set_line, rollout, line), is_delimiter)
    text = rollout.lines[line]
    if text.strip() and not _is_delimiter(text) and step < max_steps:
        return question
    del rollout.lines[line:]
    if not _is_delimiter(text):
        rollout.stop_reason = rollout.stop_reason or ("max_steps" if text.strip() else ENDED_EARLY)
        _append_for_role(rollout, DECOMPOSER, DELIMITER)
    rollout.release(DECOMPOSER, unless_shared_with=SOLVER)
    return None


def _solve_step(rollout: Rollout, step: int) -> Program[bool]:
    """Generate the solution of a step; return False if the solver generated the final answer instead."""
    line = 2 * step + 1
    completion = yield from _generate_line(
        rollout, SOLVER, partial(_set_line, rollout, line), calculator=True
    )
    if _is_delimiter(rollout.lines[line]):
        del rollout.lines[line + 1 :]
        rollout.finished = True
        rollout.stop_reason = rollout.stop_reason or ENDED_EARLY
        return False
    rollout.append(completion.tokens, SegmentRole.SOLUTION, excluding=SOLVER)
    return True


def _solve_all(rollout: Rollout, questions: Sequence[Sequence[int]]) -> Program[None]:
    for step, question in enumerate(questions):
        rollout.append(question, SegmentRole.SUBQUESTION, excluding=DECOMPOSER)
        if not (yield from _solve_step(rollout, step)):
            return
    yield from _answer(rollout)


def _answer(rollout: Rollout) -> Program[None]:
    """Generate the answer. The solver reads the delimiter first, unless the decomposer is the same model."""
    stop_tokens = rollout.context.stop_tokens
    rollout.append(stop_tokens.tokens(DELIMITER), SegmentRole.DELIMITER, excluding=DECOMPOSER)
    line = len(rollout.lines)
    yield from rollout.generate(
        SOLVER,
        lambda tokens: tokens[-1] in stop_tokens.newlines,
        lambda text: _set_line(rollout, line, DELIMITER + text),
    )
    rollout.finished = True


def _generate_line(
    rollout: Rollout,
    role: str,
    set_text: Callable[[str], None],
    is_done: Callable[[list[int]], bool] = lambda tokens: False,
    calculator: bool = False,
) -> Program[Completion]:
    """Generate one line; an end token is replaced by a line break."""
    stop_tokens = rollout.context.stop_tokens
    completion = yield from rollout.generate(
        role, lambda tokens: tokens[-1] in stop_tokens.newlines or is_done(tokens), set_text, calculator
    )
    if not completion.is_end_of_text:
        return completion
    rollout.stop_reason = rollout.stop_reason or ENDED_EARLY
    return Completion([*completion.tokens, *_append_for_role(rollout, role, "\n")], True)


def _append_for_role(rollout: Rollout, role: str, text: str) -> Sequence[int]:
    """Append a text to the sequence of the role's model alone; return its tokens."""
    tokens = rollout.context.stop_tokens.tokens(text)
    rollout.sequences[rollout.context.roles[role]].pending += tokens
    return tokens


def _set_line(rollout: Rollout, line: int, text: str) -> None:
    """Set a line of the text; missing lines before it become empty."""
    rollout.lines += [""] * (line + 1 - len(rollout.lines))
    rollout.lines[line] = _one_line(text)


def _one_line(text: str) -> str:
    return text.partition("\n")[0]


def _is_delimiter(text: str) -> bool:
    return text.lstrip().startswith(DELIMITER)
