"""Backend with one KV-cache slot per request. A step is one forward pass over slots that need their next token."""

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

MAX_PREFILL_TOKENS = 16384  # maximum number of tokens in a prefill step with several slots, to limit memory
MAX_PENDING_FOR_DECODE = 16  # on a GPU, a decode step skips slots that have more pending tokens than this
PREFILL_ONE_IN = 8  # on a GPU, prefill if a decode step would skip at least max(1, waiting slots // 8) slots


def uses_cuda_graphs(device: torch.device) -> bool:
    """Return whether decode steps run as CUDA graphs, which saves the time of kernel launches."""
    return device.type == "cuda"


def next_step_is_decode(num_pending: Sequence[int]) -> bool:
    """Return True if the next step on a GPU is a CUDA-graph decode step, False if it is a prefill step.

    num_pending: number of pending (not yet processed) tokens of each waiting slot. A decode step processes one token per slot
    and skips slots with many pending tokens. A prefill step processes all pending tokens but may take as long as several
    decode steps. The next step is a prefill step if a decode step would skip too many slots, or would produce no new token.
    No slot is skipped forever: other sequences end, so the share of skipped slots grows until a prefill step runs.
    """
    num_skipped = sum(number > MAX_PENDING_FOR_DECODE for number in num_pending)
    return 1 in num_pending and num_skipped < max(1, len(num_pending) // PREFILL_ONE_IN)


@dataclass(eq=False)
class SlotBackend(Backend[AnyRequest]):
    """Backend with one KV-cache slot per request. A request that waits for another model keeps its slot.

    The used slots are always the first slots, so attention reads them as one block of the cache. When a request ends, a new
    request gets its slot, or the request of the last used slot is moved there. The tokens of `prefix` are processed once, in
    an extra slot. Their keys and values are copied into the slot of each new request. `step` must be called within
    `prepared_model()`.
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

    @torch.inference_mode()
    def add(self, request: AnyRequest) -> None:
        """Put a request into the first slot whose request has ended. If there is no such slot, use the first unused slot."""
        released = (slot for slot, earlier in enumerate(self.slots) if self.is_released(earlier))
        slot = next(released, len(self.slots))
        assert slot < self.num_slots
        self.slots[slot : slot + 1] = [request]
        if self._prefix.pending:
            self._prefill([self.num_slots], [self._prefix])
        if length := self._prefix.length:  # the sequence starts with a copy of the prefix's keys and values
            self._cache.copy(self.num_slots, slot, length)
            self.sequence(request).length = length
            del self.sequence(request).pending[:length]

    @torch.inference_mode()
    def step(self) -> list[tuple[AnyRequest, int]]:
        """Run one forward pass over the waiting slots; see `Backend.step`.

        On a CPU, every step is a prefill step. On a GPU, `next_step_is_decode` selects a prefill or a decode step.
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

    def _prefill(self, active: list[int], sequences: list[SequenceState]) -> torch.Tensor:
        """Process all pending tokens of the slots `active`; return logits [sequences, vocabulary] of their last tokens."""
        lengths = [sequence.length for sequence in sequences]
        pending = [sequence.pending for sequence in sequences]
        model = self.model
        batch = prepare_prefill(self._cache, active, lengths, pending, model.dtype, model.device)
        logits = last_token_logits(model, batch)
        for sequence in sequences:
            sequence.length += len(sequence.pending)
            sequence.pending = []
        return logits

    def _decode(
        self, graphs: CudaGraphRunner, waiting: list[int], sequences: list[SequenceState]
    ) -> tuple[list[int], torch.Tensor]:
        """Run a decode step. Return the slots that have no pending tokens left, and their logits [slots, vocabulary]."""
        tokens, positions = [0] * len(sequences), [sequence.length for sequence in sequences]
        processed = [slot for slot in waiting if len(sequences[slot].pending) <= MAX_PENDING_FOR_DECODE]
        for slot in processed:
            tokens[slot] = sequences[slot].pending.pop(0)
            sequences[slot].length += 1
        logits = graphs.step(tokens, positions, max(sequences[slot].length for slot in processed))
        active = [slot for slot in processed if not sequences[slot].pending]
        return active, logits[: len(active)] if len(active) == len(sequences) else logits[active]

    def _compact(self) -> None:
        """Move requests of the last slots into the slots of ended requests."""
        for slot in reversed(range(len(self.slots))):
            if self.is_released(self.slots[slot]):
                last = self.slots.pop()
                if slot < len(self.slots):
                    self._cache.copy(len(self.slots), slot, self.sequence(last).length)
                    self.slots[slot] = last
