"""Slot backend: one KV-cache slot per request, and one forward pass over all waiting slots per step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from trainer.evaluation.backends import AnyRequest, Backend, SequenceState
from trainer.models.cuda_graphs import CudaGraphRunner
from trainer.models.kv_cache import KVCache, prepare_prefill
from trainer.models.prepacked_weights import prepacked_weights
from trainer.models.slot_attention import last_token_logits, use_slot_attention

MAX_PREFILL_TOKENS = 16384  # per prefill step, which bounds the activations
# GPU: sequences with at most this many pending tokens go through CUDA-graph decode steps
MAX_PENDING_FOR_DECODE = 16
PREFILL_ONE_IN = 8  # GPU: prefill when one in this many waiting slots has more pending tokens


def uses_cuda_graphs(device: torch.device) -> bool:
    """Return whether decode steps are captured in CUDA graphs, which saves the kernel launches."""
    return device.type == "cuda"


def next_step_is_decode(num_pending: Sequence[int]) -> bool:
    """Return whether the next step on a GPU is a CUDA-graph decode step, else a prefill step.

    num_pending: number of pending tokens of each waiting slot. A decode step processes one token per slot and skips slots
    with many pending tokens. A prefill step processes all pending tokens but may take as long as several decode steps, so
    it runs when enough slots need it, or when no slot would choose a token in a decode step. No slot is skipped forever:
    the number of skipped slots only grows until the next prefill step, and the other slots have finitely many tokens left.
    """
    num_skipped = sum(number > MAX_PENDING_FOR_DECODE for number in num_pending)
    return 1 in num_pending and num_skipped < max(1, len(num_pending) // PREFILL_ONE_IN)


@dataclass(eq=False)
class SlotBackend(Backend[AnyRequest]):
    """Decodes one model with one KV-cache slot per request; requests that wait for another model keep their slot.

    Used slots are always the first ones, so that attention reads them as one block of the cache: the slot of an ended
    request is refilled, or the last slot's keys and values are copied into it. `prefix` is processed in an extra slot and
    copied from there. `step` must be called within `active()`.
    """

    def __post_init__(self) -> None:
        self.slots: list[AnyRequest] = []
        self._prefix = SequenceState(list(self.prefix))
        self._cache = KVCache(self.num_slots + bool(self.prefix), self.capacity)
        self._graphs: CudaGraphRunner | None = None
        if uses_cuda_graphs(self.model.device):
            self._graphs = CudaGraphRunner(self.model, self._cache, self.num_slots)

    @contextlib.contextmanager
    def prepared_model(self) -> Iterator[None]:
        """Context manager that switches the model to slot attention and prepacked weights."""
        with use_slot_attention(self.model), prepacked_weights(self.model):
            yield

    @property
    def num_runnable(self) -> int:
        return sum(map(self.is_waiting, self.slots))

    def add(self, request: AnyRequest) -> None:
        """Put a request into the slot of an ended request, else into the next free slot."""
        for slot, other in enumerate(self.slots):
            if self.is_released(other):
                self.slots[slot] = request
                break
        else:
            slot = len(self.slots)
            assert slot < self.num_slots
            self.slots.append(request)
        self._copy_prefix(slot, self.sequence(request))

    @torch.inference_mode()
    def step(self) -> list[tuple[AnyRequest, int]]:
        """Run one forward pass over the waiting slots; return the requests without pending tokens left, with next tokens.

        On a CPU every step is a prefill step over all pending tokens; on a GPU see `next_step_is_decode`.
        """
        self._compact()
        sequences = [self.sequence(request) for request in self.slots]
        waiting = [slot for slot, request in enumerate(self.slots) if self.is_waiting(request)]
        num_pending = [len(sequences[slot].pending) for slot in waiting]
        if self._graphs and self._graphs.is_usable and next_step_is_decode(num_pending):
            active, logits = self._decode(self._graphs, waiting, sequences)
        else:
            num_active = sum(num_tokens <= MAX_PREFILL_TOKENS for num_tokens in accumulate(num_pending))
            active = waiting[: max(1, num_active)]
            logits = self._prefill(active, [sequences[slot] for slot in active])
        tokens = self.sampler(logits, [sequences[slot] for slot in active])
        return list(zip((self.slots[slot] for slot in active), tokens, strict=True))

    @torch.inference_mode()
    def _copy_prefix(self, slot: int, sequence: SequenceState) -> None:
        """Start a sequence in `slot` with a copy of the prefix's keys and values."""
        if self._prefix.pending:
            self._prefill([self.num_slots], [self._prefix])
        if length := self._prefix.length:
            self._cache.copy(self.num_slots, slot, length)
            sequence.length = length
            del sequence.pending[:length]

    def _prefill(self, active: list[int], sequences: list[SequenceState]) -> torch.Tensor:
        """Process all pending tokens of these slots; return logits [sequences, vocabulary] of their last tokens."""
        step = prepare_prefill(
            self._cache,
            active,
            [sequence.length for sequence in sequences],
            [sequence.pending for sequence in sequences],
            self.model.dtype,
            self.model.device,
        )
        logits = last_token_logits(self.model, step)
        for sequence in sequences:
            sequence.length += len(sequence.pending)
            sequence.pending = []
        return logits

    def _decode(
        self, graphs: CudaGraphRunner, waiting: list[int], sequences: list[SequenceState]
    ) -> tuple[list[int], torch.Tensor]:
        """Process one token of each waiting slot with few pending tokens.

        `sequences`: those of all used slots. Return the slots without pending tokens left, and their logits [slots,
        vocabulary].
        """
        tokens, positions = [0] * len(sequences), [sequence.length for sequence in sequences]
        longest = 0
        active: list[int] = []
        for slot in waiting:
            sequence = sequences[slot]
            if len(sequence.pending) > MAX_PENDING_FOR_DECODE:
                continue
            tokens[slot] = sequence.pending.pop(0)
            sequence.length += 1
            longest = max(longest, sequence.length)
            if not sequence.pending:
                active.append(slot)
        logits = graphs.step(tokens, positions, longest)
        return active, logits[: len(active)] if len(active) == len(sequences) else logits[active]

    def _compact(self) -> None:
        """Move the last requests into the slots of ended requests."""
        for slot in reversed(range(len(self.slots))):
            if self.is_released(self.slots[slot]):
                last = self.slots.pop()
                if slot < len(self.slots):
                    self._cache.copy(len(self.slots), slot, self.sequence(last).length)
                    self.slots[slot] = last
