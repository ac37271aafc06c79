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

from trainer.evaluation.backends import Feed
from trainer.evaluation.language import Language
from trainer.shards.methods import Role

Result = TypeVar("Result")
Script = Generator[int, int, Result]  # yields a seat, is sent the token that its model chose


@dataclass(frozen=True)
class Seat:
    """One model, and the view of a problem that it reads."""

    reads: frozenset[Role]
    context: float  # longest sequence of the model in tokens
    end_tokens: frozenset[int]


@dataclass(frozen=True)
class Rules:
    """What all solutions of an evaluation share. `voices`: who sits where; two voices may share one seat."""

    language: Language
    seats: Sequence[Seat]
    voices: Mapping[str, int]
    max_new_tokens: int  # of a problem, all voices together
    calculator: bool = True


@dataclass(frozen=True)
class Passage:
    """What a voice wrote in one go."""

    tokens: list[int]  # without the end token
    ended_text: bool  # by an end token


class Cut(Exception):
    """A solution has to stop: `max_new_tokens` or `context`."""


class Solution:
    """One problem on its way.

    turn: the seat whose model chooses the next token, None when it is over. finished: a model ended it; else it was cut.
    stopped: "" or what went otherwise than the method has it; what can be there is said in solve.py.
    """

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        rules: Rules,
        method: Callable[[Solution], Script[None]],
        noise_keys: Sequence[int],
    ) -> None:
        """`noise_keys`: one for each seat."""
        self.index = index
        self.rules = rules
        self.feeds = [Feed(list(prompt), key) for key in noise_keys]
        self.lines: list[str] = []  # of the text
        self.plan = ""  # what guided the decomposer
        self.generated: Counter[str] = Counter()  # tokens by voice; the calculator's count as its voice's
        self.calculator_results = 0
        self.finished = False
        self.stopped = ""
        self.turn: int | None = None
        self._script = self._run(method)
        self.after(None)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def after(self, token: int | None) -> None:
        """Take the token that was chosen (None: begin); `turn` is who writes next."""
        try:
            self.turn = next(self._script) if token is None else self._script.send(token)
        except StopIteration:
            self.turn = None

    def write(
        self,
        voice: str,
        is_over: Callable[[list[int]], bool],
        keep: Callable[[str], None],
        calculator: bool = False,
    ) -> Script[Passage]:
        """Let a voice write until it ends its text or `is_over(tokens)`; `keep` gets the text, also of what is cut.

        With `calculator` the results of annotations are put in. Its own model reads all of it but the end token.
        """
        language, seat = self.rules.language, self.rules.voices[voice]
        tokens: list[int] = []
        try:
            while True:
                token = yield from self._next_token(voice)
                if token in self.rules.seats[seat].end_tokens:
                    return Passage(tokens, True)
                new = [token]
                tokens.append(token)
                if calculator and self.rules.calculator and (result := language.calculated(tokens)):
                    self.calculator_results += 1
                    new += result[: self._room(seat) - 1]
                    tokens += new[1:]
                    self.generated[voice] += len(new) - 1
                self.feeds[seat].pending += new
                if is_over(tokens):
                    return Passage(tokens, False)
        finally:
            keep(language.text(tokens))

    def give(self, tokens: Sequence[int], role: Role, but: str = "") -> None:
        """Let all who read segments of this role read these tokens, except one voice that has read them."""
        for number, (feed, seat) in enumerate(zip(self.feeds, self.rules.seats, strict=True)):
            if role in seat.reads and not feed.is_over and number != self.rules.voices.get(but):
                feed.pending += tokens

    def leave(self, voice: str, staying: str) -> None:
        """`voice` reads and writes no more; its slot goes to another problem unless `staying` shares its seat."""
        seat = self.rules.voices[voice]
        self.feeds[seat].is_over = seat != self.rules.voices[staying]

    def _run(self, method: Callable[[Solution], Script[None]]) -> Script[None]:
        try:
            yield from method(self)
        except Cut as cut:
            self.stopped = str(cut)

    def _next_token(self, voice: str) -> Script[int]:
        seat = self.rules.voices[voice]
        if self.generated.total() >= self.rules.max_new_tokens:
            raise Cut("max_new_tokens")
        if self.feeds[seat].num_tokens >= self.rules.seats[seat].context:
            raise Cut("context")
        token = yield seat
        self.generated[voice] += 1
        return token

    def _room(self, seat: int) -> int:
        """How many tokens may be added before a limit cuts the solution, the one just chosen included."""
        new = self.rules.max_new_tokens - self.generated.total() + 1
        return int(min(new, self.rules.seats[seat].context - self.feeds[seat].num_tokens))
