"""One problem on its way to a solution: what each model has read of it, what was written, and where it is cut.

How a problem is solved is a generator (solve.py): it yields the seat whose model is to choose the next token and is sent
that token, so a method reads as what happens, and the machinery that decodes many problems at once (generate.py) knows
nothing of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from trainer.evaluation.backends import SequenceState
from trainer.evaluation.stop_tokens import StopTokens
from trainer.shards.methods import Role

Result = TypeVar("Result")
Program = Generator[int, int, Result]  # yields a seat, is sent the token that its model chose


@dataclass(frozen=True)
class ModelSlot:
    """One model, and the view of a problem that it reads."""

    inputs: frozenset[Role]
    context: float  # longest sequence of the model in tokens
    end_tokens: frozenset[int]


@dataclass(frozen=True)
class RolloutContext:
    """What all solutions of an evaluation share. `voices`: who sits where; two voices may share one seat."""

    stop_tokens: StopTokens
    models: Sequence[ModelSlot]
    roles: Mapping[str, int]
    max_new_tokens: int  # of a problem, all voices together
    calculator: bool = True


@dataclass(frozen=True)
class Completion:
    """What a voice wrote in one go."""

    tokens: list[int]  # without the end token
    is_end_of_text: bool  # by an end token


class LengthLimit(Exception):
    """A solution has to stop: `max_new_tokens` or `context`."""


class Rollout:
    """One problem on its way.

    turn: the seat whose model chooses the next token, None when it is over. finished: a model ended it; else it was cut.
    stopped: "" or what went otherwise than the method has it; what can be there is said in solve.py.
    """

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        rules: RolloutContext,
        method: Callable[[Rollout], Program[None]],
        noise_keys: Sequence[int],
    ) -> None:
        """`noise_keys`: one for each seat."""
        self.index = index
        self.context = rules
        self.sequences = [SequenceState(list(prompt), key) for key in noise_keys]
        self.lines: list[str] = []  # of the text
        self.plan = ""  # what guided the decomposer
        self.generated: Counter[str] = Counter()  # tokens by voice; the calculator's count as its voice's
        self.calculator_results = 0
        self.finished = False
        self.stop_reason = ""
        self.next_model: int | None = None
        self._program = self._run_program(method)
        self.on_token(None)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def on_token(self, token: int | None) -> None:
        """Take the token that was chosen (None: begin); `turn` is who writes next."""
        try:
            self.next_model = next(self._program) if token is None else self._program.send(token)
        except StopIteration:
            self.next_model = None

    def generate(
        self,
        voice: str,
        is_over: Callable[[list[int]], bool],
        keep: Callable[[str], None],
        calculator: bool = False,
    ) -> Program[Completion]:
        """Let a voice write until it ends its text or `is_over(tokens)`; `keep` gets the text, also of what is cut.

        With `calculator` the results of annotations are put in. Its own model reads all of it but the end token.
        """
        language, seat = self.context.stop_tokens, self.context.roles[voice]
        tokens: list[int] = []
        try:
            while True:
                token = yield from self._next_token(voice)
                if token in self.context.models[seat].end_tokens:
                    return Completion(tokens, True)
                new = [token]
                tokens.append(token)
                if calculator and self.context.calculator and (result := language.calculator_result(tokens)):
                    self.calculator_results += 1
                    new += result[: self._room(seat) - 1]
                    tokens += new[1:]
                    self.generated[voice] += len(new) - 1
                self.sequences[seat].pending += new
                if is_over(tokens):
                    return Completion(tokens, False)
        finally:
            keep(language.text(tokens))

    def append(self, tokens: Sequence[int], role: Role, but: str = "") -> None:
        """Let all who read segments of this role read these tokens, except one voice that has read them."""
        for number, (feed, seat) in enumerate(zip(self.sequences, self.context.models, strict=True)):
            if role in seat.inputs and not feed.is_done and number != self.context.roles.get(but):
                feed.pending += tokens

    def release(self, voice: str, staying: str) -> None:
        """`voice` reads and writes no more; its slot goes to another problem unless `staying` shares its seat."""
        seat = self.context.roles[voice]
        self.sequences[seat].is_done = seat != self.context.roles[staying]

    def _run_program(self, method: Callable[[Rollout], Program[None]]) -> Program[None]:
        try:
            yield from method(self)
        except LengthLimit as cut:
            self.stop_reason = str(cut)

    def _next_token(self, voice: str) -> Program[int]:
        seat = self.context.roles[voice]
        if self.generated.total() >= self.context.max_new_tokens:
            raise LengthLimit("max_new_tokens")
        if self.sequences[seat].num_tokens >= self.context.models[seat].context:
            raise LengthLimit("context")
        token = yield seat
        self.generated[voice] += 1
        return token

    def _room(self, seat: int) -> int:
        """How many tokens may be added before a limit cuts the solution, the one just chosen included."""
        new = self.context.max_new_tokens - self.generated.total() + 1
        return int(min(new, self.context.models[seat].context - self.sequences[seat].num_tokens))
