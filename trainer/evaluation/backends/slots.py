"""The machine that decodes: slots, one forward pass a step. What to feed next is for others to say (solve.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Generic

import torch
from transformers import PreTrainedModel

from trainer.evaluation.backends import AnyRequest, Sampler, SequenceState
from trainer.models.cuda_graphs import CudaGraphRunner
from trainer.models.kv_cache import KVCache, prepare_prefill
from trainer.models.prepacked_weights import prepacked_weights
from trainer.models.slot_attention import last_token_logits, use_slot_attention

MAX_STEP_TOKENS = 16384  # bounds the activations when many prompts are read at once
MAX_GRAPH_PENDING = 16  # on a GPU so many are read one by one, in graphs, while others decode
PREFILL_WAITING_RATIO = (
    8  # ... and a pass without a graph is made when of this many problems one has more to read
)


def uses_cuda_graphs(device: torch.device) -> bool:
    """Whether decode steps are made into graphs: where launches are what they wait for."""
    return device.type == "cuda"


def use_graph_step(num_pending: Sequence[int]) -> bool:
    """Whether the next pass on a GPU is a graph, given how many tokens are pending in the slots that wait.

    In a graph each slot reads one token, and those with many to read stand still. A pass without a graph reads all, but
    may take as long as several graphs, so it is made when some slots have gathered that need it, or nobody would choose.
    Nobody stands still for ever: those with many only grow in number until there is such a pass, and until then every
    graph takes a token of the bounded number that the others have left.
    """
    num_readers = sum(number > MAX_GRAPH_PENDING for number in num_pending)
    return 1 in num_pending and num_readers < max(1, len(num_pending) // PREFILL_WAITING_RATIO)


def _num_in_step(num_pending: Sequence[int]) -> int:
    """How many of the slots that wait are read in one pass: all, unless those were too many tokens."""
    total = accumulate(num_pending)
    return max(1, sum(num_tokens <= MAX_STEP_TOKENS for num_tokens in total))


class SlotBackend(Generic[AnyRequest]):
    """One model's slots, one for every problem on its way. `step` reads what is pending and chooses next tokens, for
    the problems whose turn is this engine's; the others are parked.

    Occupied slots are always the first ones, so that attention takes them as one block of the cache: a problem that
    leaves without a successor is replaced by the last one, which costs one copy of its keys and values.
    The caller holds `active()` open.
    """

    def __init__(
        self,
        seat: int,
        model: PreTrainedModel,
        num_slots: int,
        capacity: int,
        choose: Sampler,
        prefix: Sequence[int] = (),
    ) -> None:
        """`seat`: which of an occupant's feeds is read here. `capacity`: longest sequence in tokens.

        `choose`: logits [waiting, vocabulary] and their feeds -> tokens. `prefix`: tokens that all texts begin with; they
        are read once, into a slot of their own, and copied from there.
        """
        self.seat = seat
        self.model = model
        self.slots: list[AnyRequest] = []
        self._num_slots = num_slots
        self._prefix = SequenceState(list(prefix))
        self._cache = KVCache(num_slots + bool(prefix), capacity)
        self._choose = choose
        self._dtype = model.dtype
        self._device = model.device
        self._graphs = (
            CudaGraphRunner(model, self._cache, num_slots) if uses_cuda_graphs(model.device) else None
        )

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Context manager that switches the model to attention over slots and blocked weights."""
        with use_slot_attention(self.model), prepacked_weights(self.model):
            yield

    @property
    def num_waiting(self) -> int:
        """Problems that wait for a token of this model."""
        return sum(occupant.next_model == self.seat for occupant in self.slots)

    def add(self, occupant: AnyRequest) -> None:
        """Give a new problem a slot: one whose problem has left, else the next free one."""
        for slot, other in enumerate(self.slots):
            if self._is_released(other):
                self.slots[slot] = occupant
                break
        else:
            slot = len(self.slots)
            assert slot < self._num_slots
            self.slots.append(occupant)
        self._copy_prefix(slot, occupant.sequences[self.seat])

    @torch.inference_mode()
    def step(self) -> list[tuple[AnyRequest, int]]:
        """One forward pass for the problems that wait; those that have read all that was pending, with their next tokens.

        On a CPU every pass reads all that is pending. On a GPU it either does so too, or reads one token of each slot, by
        a graph.
        """
        self._compact()
        feeds = [occupant.sequences[self.seat] for occupant in self.slots]
        waiting = [slot for slot, occupant in enumerate(self.slots) if occupant.next_model == self.seat]
        num_pending = [len(feeds[slot].pending) for slot in waiting]
        if self._graphs and self._graphs.is_usable and use_graph_step(num_pending):
            active, logits = self._decode(self._graphs, waiting, feeds)
        else:  # always, on a CPU
            active = waiting[: _num_in_step(num_pending)]
            logits = self._prefill(active, [feeds[slot] for slot in active])
        tokens = self._choose(logits, [feeds[slot] for slot in active])
        return list(zip((self.slots[slot] for slot in active), tokens, strict=True))

    @torch.inference_mode()
    def _copy_prefix(self, slot: int, feed: SequenceState) -> None:
        """A text begins in `slot`: the prefix is there at once."""
        if self._prefix.pending:
            self._prefill([self._num_slots], [self._prefix])
        if length := self._prefix.length:
            self._cache.copy(self._num_slots, slot, length)
            feed.length = length
            del feed.pending[:length]

    def _prefill(self, active: list[int], feeds: list[SequenceState]) -> torch.Tensor:
        """One forward pass over what is pending: logits [feeds, vocabulary] of the newest tokens."""
        step = prepare_prefill(
            self._cache,
            active,
            [feed.length for feed in feeds],
            [feed.pending for feed in feeds],
            self._dtype,
            self._device,
        )
        logits = last_token_logits(self.model, step)
        for feed in feeds:
            feed.length += len(feed.pending)
            feed.pending = []
        return logits

    def _decode(
        self, graphs: CudaGraphRunner, waiting: list[int], feeds: list[SequenceState]
    ) -> tuple[list[int], torch.Tensor]:
        """One forward pass over the waiting slots with few pending tokens, the first of each: the slots that have now read
        all, and logits [such slots, vocabulary]. `feeds`: of all occupied slots."""
        tokens, positions = [0] * len(feeds), [feed.length for feed in feeds]
        longest = 0
        active: list[int] = []
        for slot in waiting:
            feed = feeds[slot]
            if len(feed.pending) > MAX_GRAPH_PENDING:
                continue
            tokens[slot] = feed.pending.pop(0)
            feed.length += 1
            longest = max(longest, feed.length)
            if not feed.pending:
                active.append(slot)
        logits = graphs.step(tokens, positions, longest)
        return active, logits[: len(active)] if len(active) == len(feeds) else logits[active]

    def _is_released(self, occupant: AnyRequest) -> bool:
        return occupant.next_model is None or occupant.sequences[self.seat].is_done

    def _compact(self) -> None:
        """The last problems move into the slots of those that have left."""
        for slot in reversed(range(len(self.slots))):
            if self._is_released(self.slots[slot]):
                last = self.slots.pop()
                if slot < len(self.slots):
                    self._cache.copy(len(self.slots), slot, last.sequences[self.seat].length)
                    self.slots[slot] = last
