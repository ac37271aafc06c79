"""The machine that decodes: slots, one forward pass a step. What to feed next is for others to say (solve.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from trainer.models.slots import SlotCache, plan_step

MOST_TOKENS_A_STEP = 16384  # bounds the activations when many prompts are read at once


@dataclass
class Feed:
    """One text as one model reads it."""

    pending: list[int]  # tokens given and not read yet
    noise_key: int = 0
    length: int = 0  # tokens read already; the engine counts
    is_over: bool = False  # its model reads no more of it

    @property
    def num_tokens(self) -> int:
        return self.length + len(self.pending)


class Occupant(Protocol):
    """What the engines know of a problem on its way."""

    @property
    def feeds(self) -> Sequence[Feed]:
        """One for each engine."""

    @property
    def turn(self) -> int | None:
        """The engine whose model is to choose the next token; None: it has ended."""


SomeOccupant = TypeVar("SomeOccupant", bound=Occupant)
Choose = Callable[[torch.Tensor, list[Feed]], list[int]]


class Engine(Generic[SomeOccupant]):
    """One model's slots, one for every problem on its way. `step` reads what is pending and chooses next tokens, for
    the problems whose turn is this engine's; the others are parked and contribute no tokens.

    Occupied slots are always the first ones, so that attention takes them as one block of the cache: a problem that
    leaves without a successor is replaced by the last one, which costs one copy of its keys and values.
    The caller holds `slot_attention_of(model)` open.
    """

    def __init__(
        self,
        seat: int,
        model: PreTrainedModel,
        num_slots: int,
        capacity: int,
        choose: Choose,
        prefix: Sequence[int] = (),
    ) -> None:
        """`seat`: which of an occupant's feeds is read here. `capacity`: longest sequence in tokens.

        `choose`: logits [waiting, vocabulary] and their feeds -> tokens. `prefix`: tokens that all texts begin with; they
        are read once, into a slot of their own, and copied from there.
        """
        self.seat = seat
        self.model = model
        self.slots: list[SomeOccupant] = []
        self._num_slots = num_slots
        self._prefix = Feed(list(prefix))
        self._cache = SlotCache(num_slots + bool(prefix), capacity)
        self._choose = choose
        self._dtype = model.dtype
        self._device = model.device

    @property
    def num_waiting(self) -> int:
        """Problems that wait for a token of this model."""
        return sum(occupant.turn == self.seat for occupant in self.slots)

    def add(self, occupant: SomeOccupant) -> None:
        """Give a new problem a slot: one whose problem has left, else the next free one."""
        for slot, other in enumerate(self.slots):
            if self._has_left(other):
                self.slots[slot] = occupant
                break
        else:
            slot = len(self.slots)
            assert slot < self._num_slots
            self.slots.append(occupant)
        self._begin(slot, occupant.feeds[self.seat])

    @torch.inference_mode()
    def step(self) -> list[tuple[SomeOccupant, int]]:
        """Read the pending tokens of waiting problems in one forward pass; each with its next token.

        All that wait take part, unless that were too many tokens for one pass.
        """
        self._close_gaps()
        active: list[int] = []
        num_tokens = 0
        for slot, occupant in enumerate(self.slots):
            if occupant.turn != self.seat:
                continue
            num_tokens += len(occupant.feeds[self.seat].pending)
            if active and num_tokens > MOST_TOKENS_A_STEP:
                break
            active.append(slot)
        feeds = [self.slots[slot].feeds[self.seat] for slot in active]
        logits = self._read(active, feeds)
        return list(zip((self.slots[slot] for slot in active), self._choose(logits, feeds), strict=True))

    @torch.inference_mode()
    def _begin(self, slot: int, feed: Feed) -> None:
        """A text begins in `slot`: the prefix is there at once."""
        if self._prefix.pending:
            self._read([self._num_slots], [self._prefix])
        if length := self._prefix.length:
            self._cache.copy(self._num_slots, slot, length)
            feed.length = length
            del feed.pending[:length]

    def _read(self, active: list[int], feeds: list[Feed]) -> torch.Tensor:
        """One forward pass over what is pending: logits [feeds, vocabulary] of the newest tokens."""
        step = plan_step(
            self._cache,
            active,
            [feed.length for feed in feeds],
            [feed.pending for feed in feeds],
            self._dtype,
            self._device,
        )
        logits: torch.Tensor = self.model(
            input_ids=step.input_ids,
            position_ids=step.positions,
            use_cache=False,
            logits_to_keep=step.num_newest,
            slot_step=step,
        ).logits[0]
        for feed in feeds:
            feed.length += len(feed.pending)
            feed.pending = []
        return logits

    def _has_left(self, occupant: SomeOccupant) -> bool:
        return occupant.turn is None or occupant.feeds[self.seat].is_over

    def _close_gaps(self) -> None:
        """The last problems move into the slots of those that have left."""
        for slot in reversed(range(len(self.slots))):
            if self._has_left(self.slots[slot]):
                last = self.slots.pop()
                if slot < len(self.slots):
                    self._cache.copy(len(self.slots), slot, last.feeds[self.seat].length)
                    self.slots[slot] = last
