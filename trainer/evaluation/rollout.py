"""State of one problem while it is solved: sequences of the models, lines of the text, token counts and limits.

A solving program (programs.py) is a generator: it yields the number of the model that must choose the next token, and is
sent that token. It does not depend on how many problems are decoded together (generate.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from trainer.evaluation.backends import SequenceState
from trainer.evaluation.stop_tokens import StopTokens
from trainer.shards.methods import SegmentRole

Result = TypeVar("Result")
Program = Generator[int, int, Result]  # yields model numbers, is sent the tokens that these models choose


@dataclass(frozen=True)
class RolloutModel:
    """Segment roles that a model reads, and where its sequences end."""

    inputs: frozenset[SegmentRole]
    context_length: float  # in tokens; infinity if unlimited
    end_tokens: frozenset[int]


@dataclass(frozen=True)
class RolloutContext:
    """Settings shared by all rollouts of an evaluation. `roles`: role -> model number; two roles may share a model."""

    stop_tokens: StopTokens
    models: Sequence[RolloutModel]
    roles: Mapping[str, int]
    max_new_tokens: int  # per problem, summed over all roles
    calculator: bool = True


@dataclass(frozen=True)
class Completion:
    """Tokens that a role generated in one call of `generate`, without the end token."""

    tokens: list[int]
    is_end_of_text: bool  # an end token was generated


class LengthLimit(Exception):
    """A rollout reached `max_new_tokens` or a model's `context`; the message is that word."""


class Rollout:
    """One problem being solved.

    next_model: number of the model that chooses the next token, None when the rollout has ended. finished: the program
    ran to its end, else a length limit cut the text. stop_reason: "" after a normal end, else one of those in programs.py.
    """

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        context: RolloutContext,
        program: Callable[[Rollout], Program[None]],
        sampling_seeds: Sequence[int],
    ) -> None:
        """`sampling_seeds`: one per model."""
        self.index = index
        self.context = context
        self.sequences = [SequenceState(list(prompt), seed) for seed in sampling_seeds]
        self.lines: list[str] = []  # of the text
        self.guidance_text = ""  # guidance of the decomposer
        self.generated: Counter[str] = Counter()  # tokens by role, calculator results included
        self.calculator_results = 0
        self.finished = False
        self.stop_reason = ""
        self.next_model: int | None = None
        self._program = program(self)
        self.on_token(None)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def on_token(self, token: int | None) -> None:
        """Resume the program with the chosen token (None: start it) and update `next_model`."""
        try:
            self.next_model = next(self._program) if token is None else self._program.send(token)
        except StopIteration:
            self.next_model = None
        except LengthLimit as limit:
            self.next_model, self.stop_reason = None, str(limit)

    def generate(
        self,
        role: str,
        is_done: Callable[[list[int]], bool],
        set_text: Callable[[str], None],
        calculator: bool = False,
    ) -> Program[Completion]:
        """Generate tokens of `role` until an end token or `is_done(tokens)`; its model reads all but the end token.

        `set_text` receives the decoded text, also when a length limit cuts it. With `calculator`, results of open
        calculator annotations are inserted.
        """
        stop_tokens, number = self.context.stop_tokens, self.context.roles[role]
        sequence, model = self.sequences[number], self.context.models[number]
        tokens: list[int] = []
        try:
            while True:
                if self.generated.total() >= self.context.max_new_tokens:
                    raise LengthLimit("max_new_tokens")
                if sequence.num_tokens >= model.context_length:
                    raise LengthLimit("context")
                token = yield number
                self.generated[role] += 1
                if token in model.end_tokens:
                    return Completion(tokens, True)
                tokens.append(token)
                sequence.pending.append(token)
                has_calculator = calculator and self.context.calculator
                if has_calculator and (result := stop_tokens.calculator_result(tokens)):
                    self.calculator_results += 1
                    room = self.context.max_new_tokens - self.generated.total()
                    given = result[: int(min(room, model.context_length - sequence.num_tokens))]
                    tokens += given
                    sequence.pending += given
                    self.generated[role] += len(given)
                if is_done(tokens):
                    return Completion(tokens, False)
        finally:
            set_text(stop_tokens.text(tokens))

    def append(self, tokens: Sequence[int], segment_role: SegmentRole, excluding: str = "") -> None:
        """Append tokens to the sequences of all models that read this segment role.

        `excluding`: a role whose model has read the tokens already.
        """
        for number, (sequence, model) in enumerate(zip(self.sequences, self.context.models, strict=True)):
            is_excluded = number == self.context.roles.get(excluding)
            if segment_role in model.inputs and not sequence.is_done and not is_excluded:
                sequence.pending += tokens

    def release(self, role: str, unless_shared_with: str) -> None:
        """End the sequence of a role, which frees its slot, unless the other role uses the same model."""
        number = self.context.roles[role]
        self.sequences[number].is_done = number != self.context.roles[unless_shared_with]
