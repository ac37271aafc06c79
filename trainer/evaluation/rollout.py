"""State of one problem while it is solved: sequences of the models, lines of the solution, token counts and limits.

A solving program (programs.py) is a generator. It yields the index of the model that must choose the next token, and
receives this token through `send`. generate.py decides how many problems are decoded together.
"""

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from trainer.evaluation.backends import SequenceState
from trainer.evaluation.stop_tokens import StopTokens
from trainer.shards.methods import SegmentRole

Result = TypeVar("Result")
Program = Generator[int, int, Result]  # yields model indices and receives the tokens that these models choose


@dataclass(frozen=True)
class RolloutModel:
    """Properties of a model that rollouts depend on."""

    inputs: frozenset[SegmentRole]  # segment roles that the model reads
    context_length: float  # in tokens; infinity if unlimited
    end_tokens: frozenset[int]  # ids of the tokens that end a text


@dataclass(frozen=True)
class RolloutContext:
    """Settings shared by all rollouts of an evaluation."""

    stop_tokens: StopTokens
    models: Sequence[RolloutModel]
    roles: Mapping[str, int]  # role -> index in `models`; two roles may share a model
    max_new_tokens: int  # maximum number of generated tokens per problem, summed over all roles
    calculator: bool = True  # whether results are inserted into calculator annotations


@dataclass(frozen=True)
class Completion:
    """Tokens from one call of `Rollout.generate`, with inserted calculator results and without the end token."""

    tokens: list[int]
    is_end_of_text: bool  # whether an end token followed


class LengthLimit(Exception):
    """Raised if a rollout reaches a length limit; the message is the stop reason, "max_new_tokens" or "context"."""


class Rollout:
    """One problem that is being solved.

    next_model: index of the model that must choose the next token; None after the end. finished: True if the rollout has
    ended and no length limit was reached. stop_reason: reason for an irregular end (programs.py lists the values), or "".
    """

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        context: RolloutContext,
        program: Callable[["Rollout"], Program[None]],
        sampling_seeds: Sequence[int],  # one per model
    ) -> None:
        self.index = index
        self.context = context
        self.sequences = [SequenceState(list(prompt), seed) for seed in sampling_seeds]
        self.lines: list[str] = []
        self.guidance_text = ""  # the plan that the decomposer reads
        # Role -> number of tokens, with calculator results and end tokens.
        self.generated: Counter[str] = Counter()
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
        """Send the chosen token to the program, or start the program if `token` is None. Update `next_model`."""
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
        """Generate tokens of `role` until the model chooses an end token or `is_done(tokens)` is true.

        Return a Completion. All tokens except the end token are appended to the sequence of the role's model. If `calculator`
        and `context.calculator` are True, results are inserted into calculator annotations. Raises LengthLimit at
        `max_new_tokens` or at the model's context length. `set_text` receives the decoded text, even after LengthLimit.
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
                    inserted = result[: int(min(room, model.context_length - sequence.num_tokens))]
                    tokens += inserted
                    sequence.pending += inserted
                    self.generated[role] += len(inserted)
                if is_done(tokens):
                    return Completion(tokens, False)
        finally:
            set_text(stop_tokens.text(tokens))

    def append(self, tokens: Sequence[int], segment_role: SegmentRole, excluding: str = "") -> None:
        """Append tokens to each unfinished sequence whose model reads `segment_role`, except the sequence of role `excluding`."""
        for number, (sequence, model) in enumerate(zip(self.sequences, self.context.models, strict=True)):
            is_excluded = number == self.context.roles.get(excluding)
            if segment_role in model.inputs and not sequence.is_done and not is_excluded:
                sequence.pending += tokens

    def release(self, role: str, unless_shared_with: str) -> None:
        """Mark the sequence of `role` as done, which frees its slot, unless role `unless_shared_with` uses the same sequence."""
        number = self.context.roles[role]
        self.sequences[number].is_done = number != self.context.roles[unless_shared_with]
