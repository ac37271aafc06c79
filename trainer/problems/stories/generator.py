"""The plot of a story: one running quantity, changed event by event, each event one or two steps of arithmetic.

A story starts with something collected in one of the worlds. Then things happen: some is found, lost, handed out,
multiplied; it is packed into containers, sold for dollars, shared among friends (the story goes on with one of
them), and dollars buy other goods. Which events are possible follows from what the quantity is (`items`,
`containers`, `money` or `goods`) and from its value, so every result is a whole number from 2 to LARGEST and every
division comes out even. The second step of an event of two steps needs the result of the first, and some events
point back to the beginning, so a long story is more than a list of operations on the last number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from trainer.problems.problem import Step
from trainer.problems.stories import templates
from trainer.problems.stories.templates import Groups, Phrase

MAX_NUMBER = 999
MAX_OPENING = 60
MAX_CHANGE = 40
MAX_GROUP = 12
MAX_FACTOR = 9
MIN_STEPS_BEFORE_LOOK_BACK = 3

Anything = TypeVar("Anything")


class Retry(Exception):
    """This event cannot happen now: the numbers do not allow it, or its phrases have all been told."""


class Story:
    """A story of exactly `num_steps` steps, told while it is constructed.

    `question` and `steps` are its text. Raises DeadEnd when it cannot be continued; the caller begins another one.
    Randomness comes from `random.Random.random` alone: no other method promises the same values in every Python.
    """

    def __init__(self, rng: random.Random, num_steps: int) -> None:
        self._random = rng.random
        self._num_steps = num_steps
        self._sentences: list[str] = []
        self._told: set[str] = set()
        self.steps: list[Step] = []
        self._world = self._choose(templates.SETTINGS)
        hero, friend = self._choose(templates.PEOPLE), self._choose(templates.PEOPLE)
        while friend is hero:
            friend = self._choose(templates.PEOPLE)
        self._fields: dict[str, object] = {}
        self._name_people(hero, friend)
        self._set_quantity("items", self._world.units)
        self._value = 0
        self._open()
        self._opening_value, self._opening_hero = self._value, hero
        while len(self.steps) < num_steps:
            self._next_event()

    @property
    def question(self) -> str:
        """The whole problem on one line; it ends with the last sub-question."""
        return " ".join([*self._sentences, self.steps[-1].question])

    # Choosing.

    def _integer(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        if low > high:
            raise Retry
        return low + int(self._random() * (high - low + 1))

    def _choose(self, options: Sequence[Anything]) -> Anything:
        return options[int(self._random() * len(options))]

    def _divisor(self, largest: int) -> int:
        """A number that divides the value evenly and leaves at least 2."""
        divisors = [d for d in range(2, min(largest, self._value // 2) + 1) if self._value % d == 0]
        if not divisors:
            raise Retry
        return self._choose(divisors)

    def _unused(self, phrases: Sequence[Phrase]) -> Phrase:
        """A phrase that this story has not used yet."""
        fresh = [phrase for phrase in phrases if phrase[0] not in self._told]
        if not fresh:
            raise Retry
        return self._choose(fresh)

    def _next_event(self) -> None:
        missing = self._num_steps - len(self.steps)
        for _ in range(10):
            event, event_steps = self._choose(_EVENTS[self._kind])
            if event_steps <= missing:
                try:
                    event(self)
                    return
                except Retry:
                    continue
        raise Retry

    # Telling.

    def _name_people(self, hero: templates.Person, friend: templates.Person) -> None:
        self._hero, self._friend = hero, friend
        self._fields.update(Name=hero.name, he=hero.he, his=hero.his, him=hero.him, Friend=friend.name)
        self._fields.update(He=hero.he.capitalize(), His=hero.his.capitalize())

    def _set_quantity(self, kind: str, units: str) -> None:
        self._kind = kind
        self._fields["units"] = units

    def _add_sentence(self, sentence: str, **numbers: int) -> None:
        if sentence in self._told:
            raise Retry
        self._told.add(sentence)
        self._sentences.append(sentence.format(**self._fields, **numbers))

    def _add_step(self, ask: str, solve: str, left: int, operator: str, right: int) -> int:
        """Add a step and return its result; in `solve`, {result} stands for the calculation."""
        if operator == "+":
            value = left + right
        elif operator == "-":
            value = left - right
        else:
            value = left * right if operator == "*" else left // right
        result = f"{left}{operator}{right} = <<{left}{operator}{right}={value}>>{value}"
        self.steps.append(Step(ask.format(**self._fields), solve.format(**self._fields, result=result)))
        return value

    def _has(self, when: str, operator: str, right: int) -> None:
        """The step most events end with: what the hero has at that moment."""
        ask = "How many {units} does {he} have " + when + "?"
        self._value = self._add_step(ask, "{He} has {result} {units}.", self._value, operator, right)

    # What may happen.

    def _open(self) -> None:
        if self._random() < 0.3:
            sentence, ask = self._world.opening_in_groups
            k, b = self._integer(2, MAX_FACTOR), self._integer(2, MAX_GROUP)
            self._add_sentence(sentence, k=k, b=b)
            self._value = self._add_step(ask, "{He} starts with {result} {units}.", k, "*", b)
        else:
            self._value = self._integer(5, MAX_OPENING)
            self._add_sentence(self._choose(self._world.openings), a=self._value)

    def gain(self) -> None:
        sentence, when = self._unused(self._of_kind(self._world.gains, templates.GAINS))
        b = self._integer(2, min(MAX_CHANGE, MAX_NUMBER - self._value))
        self._add_sentence(sentence, b=b)
        self._has(when, "+", b)

    def lose(self) -> None:
        sentence, when = self._unused(self._of_kind(self._world.losses, templates.LOSSES))
        b = self._integer(2, min(MAX_CHANGE, self._value - 2))
        self._add_sentence(sentence, b=b)
        self._has(when, "-", b)

    def grow(self) -> None:
        sentence, when = self._world.growth if self._kind == "items" else templates.MONEY_GROWTH
        k = self._integer(2, min(5, MAX_NUMBER // self._value))
        self._add_sentence(sentence, k=k)
        self._has(when, "*", k)

    def groups_arrive(self) -> None:
        groups = self._world.groups_in if self._kind == "items" else templates.MONEY_GROUPS_IN
        k = self._integer(2, MAX_FACTOR)
        b = self._integer(2, min(MAX_GROUP, (MAX_NUMBER - self._value) // k))
        self._groups(groups, k, b, "+")

    def groups_leave(self) -> None:
        groups = self._world.groups_out if self._kind == "items" else templates.MONEY_GROUPS_OUT
        k = self._integer(2, min(MAX_FACTOR, (self._value - 2) // 2))
        b = self._integer(2, min(MAX_GROUP, (self._value - 2) // k))
        self._groups(groups, k, b, "-")

    def _groups(self, groups: Groups, k: int, b: int, operator: str) -> None:
        sentence, ask, solve, when = groups
        self._add_sentence(sentence, k=k, b=b)
        self._has(when, operator, self._add_step(ask, solve, k, "*", b))

    def friend_gives(self) -> None:
        """A friend has so many times as many, or so many more or fewer, and gives them all."""
        operator = self._choose("*+-")
        largest = {
            "*": min(4, MAX_NUMBER // self._value - 1),
            "+": MAX_CHANGE,
            "-": min(MAX_CHANGE, self._value - 2),
        }
        b = self._integer(2, largest[operator])
        if 2 * self._value + b > MAX_NUMBER:
            raise Retry
        self._add_sentence(templates.FRIEND_GIVES[operator], b=b)
        ask, solve = "How many {units} does {Friend} give?", "{Friend} gives {result} {units}."
        self._has("with those of {Friend}", "+", self._add_step(ask, solve, self._value, operator, b))

    def as_at_the_start(self) -> None:
        """Points back to the beginning: as many again as the hero had then."""
        if not self._start_is_far() or self._value + self._opening_value > MAX_NUMBER:
            raise Retry
        self._add_sentence(templates.AS_AT_THE_START)
        self._has("with the present of {Friend}", "+", self._opening_value)

    def more_than_at_the_start(self) -> None:
        """Points back to the beginning, and only as the last question."""
        is_last = len(self.steps) == self._num_steps - 1
        if not is_last or not self._start_is_far() or self._value < self._opening_value + 2:
            raise Retry
        ask, solve = (
            "How many more {units} does {he} have than at the start?",
            "{He} has {result} more {units}.",
        )
        self._value = self._add_step(ask, solve, self._value, "-", self._opening_value)

    def _start_is_far(self) -> bool:
        """Whether the hero of the beginning is still the hero, and some steps have passed since."""
        return self._hero is self._opening_hero and len(self.steps) >= MIN_STEPS_BEFORE_LOOK_BACK

    def pack(self) -> None:
        b = self._divisor(MAX_GROUP)
        self._add_sentence(self._world.packing, b=b)
        self._set_quantity("containers", self._world.containers)
        ask, solve = "How many {units} does {he} fill?", "{He} fills {result} {units}."
        self._value = self._add_step(ask, solve, self._value, "/", b)

    def share(self) -> None:
        k = self._divisor(MAX_FACTOR)
        self._name_people(self._friend, self._hero)
        self._add_sentence(templates.SHARE, k=k)
        ask, solve = "How many {units} does {Name} get?", "{Name} gets {result} {units}."
        self._value = self._add_step(ask, solve, self._value, "/", k)

    def sell(self) -> None:
        b = self._integer(2, min(MAX_FACTOR, MAX_NUMBER // self._value))
        self._add_sentence(templates.SELL, b=b)
        self._set_quantity("money", "dollars")
        ask, solve = "How many {units} does {he} earn at the market?", "{He} earns {result} {units}."
        self._value = self._add_step(ask, solve, self._value, "*", b)

    def buy(self) -> None:
        b = self._divisor(MAX_GROUP)
        self._set_quantity("goods", self._choose(templates.GOODS))
        self._add_sentence(templates.BUY, b=b)
        ask, solve = "How many {units} does {he} buy?", "{He} buys {result} {units}."
        self._value = self._add_step(ask, solve, self._value, "/", b)

    def _of_kind(self, items: Sequence[Phrase], others: dict[str, tuple[Phrase, ...]]) -> Sequence[Phrase]:
        return items if self._kind == "items" else others[self._kind]


_Event = tuple[Callable[[Story], None], int]
"""What happens, and how many steps it takes."""

_GAIN, _LOSE, _GROW, _SHARE = (Story.gain, 1), (Story.lose, 1), (Story.grow, 1), (Story.share, 1)
_SELL, _BUY, _PACK = (Story.sell, 1), (Story.buy, 1), (Story.pack, 1)
_GROUPS = ((Story.groups_arrive, 2), (Story.groups_leave, 2))
_LOOK_BACK = ((Story.as_at_the_start, 1), (Story.more_than_at_the_start, 1))
# An event listed twice is twice as likely.
_EVENTS: dict[str, tuple[_Event, ...]] = {
    "items": (
        *(_GAIN, _GAIN, _LOSE, _LOSE, _GROW, _SHARE, _SELL, _PACK),
        *(*_GROUPS, (Story.friend_gives, 2), *_LOOK_BACK),
    ),
    "containers": (_GAIN, _LOSE, _SELL, _SELL),
    "money": (_GAIN, _LOSE, _GROW, _SHARE, *_GROUPS, _BUY, _BUY),
    "goods": (_GAIN, _LOSE, _SHARE),
}
