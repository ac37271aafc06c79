"""The machine that decodes: slots, one forward pass a step. What to feed next is for others to say (solve.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from trainer.models.slots import SlotCache, plan_step


class Feed(Protocol):
    """What the engine knows of a sequence."""

    pending: list[int]  # tokens to read before the next one is chosen, at least one
    length: int  # tokens read already; the engine counts


SomeFeed = TypeVar("SomeFeed", bound=Feed)


class Engine(Generic[SomeFeed]):
    """Slots 0..len(live)-1 hold one sequence each; `step` reads what is pending and chooses every one's next token.

    Live slots are always the first ones, so that attention takes them as one block of the cache: a sequence that
    leaves without a successor is replaced by the last one, which costs one copy of its keys and values.
    The caller holds `slot_attention_of(model)` open.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_slots: int,
        capacity: int,
        choose: Callable[[torch.Tensor, list[SomeFeed]], list[int]],
    ) -> None:
        """`capacity`: longest sequence in tokens. `choose`: logits [live, vocabulary] and sequences -> tokens."""
        self.model = model
        self.cache = SlotCache(num_slots, capacity)
        self.live: list[SomeFeed] = []
        self._choose = choose
        self._dtype = model.dtype
        self._device = model.device

    @property
    def num_free(self) -> int:
        return self.cache.num_slots - len(self.live)

    def add(self, sequence: SomeFeed) -> None:
        """Give a new sequence the next free slot."""
        assert self.num_free > 0
        self.live.append(sequence)

    def replace(self, slot: int, sequence: SomeFeed) -> None:
        """Give the slot of a sequence that has ended to a new one."""
        self.live[slot] = sequence

    @torch.inference_mode()
    def remove(self, slot: int) -> None:
        """Empty the slot of a sequence that has ended; the last sequence moves into it."""
        last = self.live.pop()
        if slot < len(self.live):
            self.cache.copy(len(self.live), slot, last.length)
            self.live[slot] = last

    @torch.inference_mode()
    def step(self) -> list[int]:
        """Read all pending tokens in one forward pass; the next token of each live sequence."""
        step = plan_step(
            self.cache,
            [sequence.length for sequence in self.live],
            [sequence.pending for sequence in self.live],
            self._dtype,
            self._device,
        )
        logits = self.model(
            input_ids=step.input_ids,
            position_ids=step.positions,
            use_cache=False,
            logits_to_keep=step.num_live,
            slot_step=step,
        ).logits[0]
        for sequence in self.live:
            sequence.length += len(sequence.pending)
        return self._choose(logits, self.live)
