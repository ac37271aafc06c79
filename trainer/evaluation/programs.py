"""Solving programs: generators that define which role generates next and which tokens each model reads (see rollout.py).

*Unified*: one model generates the whole text: an answer, a chain of thought, or sub-questions and their solutions.
*Few-shot*: one model reads solved problems and the new problem, and generates a chain of thought.
*Iterative* (Shridhar, Stolfo and Sachan, Findings of ACL 2023): a decomposer generates sub-questions. A solver solves each
sub-question immediately (interleaved), or all sub-questions at the end (ahead).
*Gold*: a solver solves the data's sub-questions.

A sub-question or solution is one line, which ends with the first token that contains a line break. After the last
sub-question, the decomposer generates `####`; the solver reads `####` and generates the answer. As in training, lines 0, 2,
4, ... of the text are sub-questions, lines 1, 3, 5, ... are their solutions, and the last line is `#### answer`.

Values of `stop_reason`:

    max_steps       The decomposer generated more than `max_steps` sub-questions. The last sub-question is dropped.
    ended_early     One of: the decomposer generated an end token or an empty line instead of `####`; a role generated an
                    end token within a line; the solver generated `####` (then the answer) instead of a solution.
    max_new_tokens  The text reached the limit on generated tokens. Overrides the reasons above.
    context         A sequence reached the model's context length. Overrides the reasons above.
"""

from collections.abc import Callable, Sequence
from functools import partial

from trainer.evaluation.decoding import DECOMPOSER, PLANNER, SOLVER, STUDENT
from trainer.evaluation.rollout import Completion, Program, Rollout
from trainer.problems.problem import DELIMITER
from trainer.shards.methods import SegmentRole

ENDED_EARLY = "ended_early"

SolvingProgram = Callable[[Rollout], Program[None]]


def unified(rollout: Rollout, opening: str = "") -> Program[None]:
    """Generate until an end token. The model first reads the text `opening`, which also starts the rollout's text."""
    rollout.lines = [opening]
    _append_for_role(rollout, STUDENT, opening)

    def set_text(text: str) -> None:
        rollout.lines = [opening + text]

    completion = yield from rollout.generate(STUDENT, lambda tokens: False, set_text, calculator=True)
    rollout.finished = completion.is_end_of_text


def few_shot(rollout: Rollout) -> Program[None]:
    """Generate until an end token or a line break after `####`. Otherwise, the model would continue with another problem."""
    stop_tokens = rollout.context.stop_tokens

    def is_done(tokens: list[int]) -> bool:
        return tokens[-1] in stop_tokens.newlines and DELIMITER in stop_tokens.text(tokens)

    def set_text(text: str) -> None:
        reasoning, delimiter, answer = text.partition(DELIMITER)
        rollout.lines = [reasoning + delimiter + _one_line(answer)]

    yield from rollout.generate(STUDENT, is_done, set_text, calculator=True)
    rollout.finished = True


def interleaved(rollout: Rollout, max_steps: int, guidance: SolvingProgram) -> Program[None]:
    """Generate sub-questions and solutions alternately. The decomposer reads all earlier solutions."""
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
    """Do nothing: the decomposer reads no plan."""
    yield from ()


def gold_guidance(rollout: Rollout, segment_role: SegmentRole, tokens: Sequence[int]) -> Program[None]:
    """Append the data's plan to the decomposer's sequence. `tokens` is empty if the data has no plan."""
    rollout.guidance_text = _one_line(rollout.context.stop_tokens.text(tokens))
    rollout.append(tokens, segment_role)
    yield from ()


def planner_guidance(rollout: Rollout, segment_role: SegmentRole) -> Program[None]:
    """Generate a plan with the planner and append its tokens to the decomposer's sequence."""

    def set_text(text: str) -> None:
        rollout.guidance_text = _one_line(text)

    plan = yield from _generate_line(rollout, PLANNER, set_text)
    rollout.append(plan.tokens, segment_role, excluding=PLANNER)
    rollout.release(PLANNER, unless_shared_with=DECOMPOSER)


def _generate_question(rollout: Rollout, step: int, max_steps: int) -> Program[Completion | None]:
    """Generate the decomposer's next sub-question and return it; return None after the last sub-question."""
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
    """Generate the solution of a step and return True. Return False if the solver generated the final answer instead."""
    line = 2 * step + 1
    set_text = partial(_set_line, rollout, line)
    completion = yield from _generate_line(rollout, SOLVER, set_text, calculator=True)
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
    """Append `####` to every sequence except the decomposer's (which ends with `####`). Then generate the answer."""
    stop_tokens, line = rollout.context.stop_tokens, len(rollout.lines)
    rollout.append(stop_tokens.tokens(DELIMITER), SegmentRole.DELIMITER, excluding=DECOMPOSER)

    def set_text(text: str) -> None:
        _set_line(rollout, line, DELIMITER + text)

    yield from rollout.generate(SOLVER, lambda tokens: tokens[-1] in stop_tokens.newlines, set_text)
    rollout.finished = True


def _generate_line(
    rollout: Rollout,
    role: str,
    set_text: Callable[[str], None],
    is_done: Callable[[list[int]], bool] = lambda tokens: False,
    calculator: bool = False,
) -> Program[Completion]:
    """Generate until a line break, an end token or `is_done(tokens)`. A line break is appended in place of an end token."""
    stop_tokens = rollout.context.stop_tokens
    completion = yield from rollout.generate(
        role, lambda tokens: tokens[-1] in stop_tokens.newlines or is_done(tokens), set_text, calculator
    )
    if not completion.is_end_of_text:
        return completion
    rollout.stop_reason = rollout.stop_reason or ENDED_EARLY
    return Completion([*completion.tokens, *_append_for_role(rollout, role, "\n")], True)


def _append_for_role(rollout: Rollout, role: str, text: str) -> Sequence[int]:
    """Append the tokens of `text` to the sequence of this role's model only; return the tokens."""
    tokens = rollout.context.stop_tokens.tokens(text)
    rollout.sequences[rollout.context.roles[role]].pending += tokens
    return tokens


def _set_line(rollout: Rollout, line: int, text: str) -> None:
    """Set line number `line` of the rollout's text to the first line of `text`. Missing lines before it become empty."""
    rollout.lines += [""] * (line + 1 - len(rollout.lines))
    rollout.lines[line] = _one_line(text)


def _one_line(text: str) -> str:
    return text.partition("\n")[0]


def _is_delimiter(text: str) -> bool:
    return text.lstrip().startswith(DELIMITER)
