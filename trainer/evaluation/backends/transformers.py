"""Transformers backend: the model's own forward pass and cache, for every family that `generate` can decode.

Recurrent layers ignore padding masks. Therefore batches have no padding: all rows of a batch have the same length. The first
forward pass of a batch processes as many tokens per row as the shortest prompt has. Later passes usually process one token
per row: the newest generated token, or the next token of a longer prompt or of a calculator result. Inputs and cache are
prepared by the methods of the model that `generate` calls.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, Self

import torch
from transformers import Cache, PreTrainedModel

from trainer.evaluation.backends import AnyRequest, Backend
from trainer.models.default_attention import attention_of_submodules, evaluation_mode, uses_sdpa
from trainer.models.prepacked_weights import prepacked_weights
from trainer.runtime import library_internals

_CACHE_NAMES = ("past_key_values", "cache_params", "state")  # keys of model outputs that may be the cache
_TRANSFORMERS_ATTENTION = {"sdpa", "eager"}
_MAX_PROMPT_TOKENS = 16384  # maximum sum of prompt lengths in a batch; bounds the memory of a forward pass


@dataclass(frozen=True)
class CacheUse:
    """Options for the use of a model's cache. backend_check.py detects options that give wrong logits in a model.

    batch: decode several requests together. select: remove ended rows from the cache; if False, ended rows get dummy tokens
    until the batch ends. chunks: add several tokens per row to a cache that is not empty; if False, only one token per row.
    cache: keep the cache between steps; if False, every step processes the whole sequences again.
    """

    batch: bool = True
    select: bool = True
    chunks: bool = True
    cache: bool = True


# From fastest to slowest. The first item that passes backend_check.py is used.
CACHE_USES = (
    CacheUse(),
    CacheUse(chunks=False),
    CacheUse(chunks=False, select=False),
    CacheUse(chunks=False, select=False, batch=False),
    CacheUse(cache=False),
    CacheUse(cache=False, batch=False),
)


@contextlib.contextmanager
def default_attention(model: PreTrainedModel, attention: str | None = None) -> Iterator[None]:
    """Context manager that sets evaluation mode and an attention implementation of transformers. Both are restored on exit.

    attention: "sdpa" or "eager"; None: keep the current one if it is "sdpa" or "eager", else set the family's default.
    """
    in_use = [name for _, name in attention_of_submodules(model)]
    if attention is None and not set(in_use) <= _TRANSFORMERS_ATTENTION:
        attention = _default(model)
    with evaluation_mode(model, attention):
        for submodel in model.modules():  # `evaluation_mode` does not change the attention of every submodel
            if (
                isinstance(submodel, PreTrainedModel)
                and library_internals.get_attention(submodel.config) not in _TRANSFORMERS_ATTENTION
            ):
                library_internals.set_attention(submodel.config, _default(submodel))
        yield


def _default(model: PreTrainedModel) -> str:
    return "sdpa" if uses_sdpa(model) else "eager"


class _Batch(Generic[AnyRequest]):
    """A batch: processed tokens in rows of equal length, the cache of these tokens, and each row's request (None: ended)."""

    def __init__(self, model: PreTrainedModel, num_rows: int, capacity: int, use_cache: bool) -> None:
        self._model: Any = model
        self._capacity = capacity
        self._use_cache = use_cache
        self._cache: dict[str, Any] = {}  # name of the forward argument -> cache
        self.input_ids = torch.zeros(num_rows, 0, dtype=torch.int64, device=model.device)
        self.requests: list[AnyRequest | None] = [None] * num_rows

    def forward(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Process `tokens` [rows, new tokens]; return the logits [rows, vocabulary] of the last tokens."""
        new = torch.tensor(tokens, dtype=torch.int64).to(self._model.device)
        self.input_ids = torch.cat([self.input_ids, new], dim=1)
        outputs = self._model(**self._inputs(new.shape[1]), return_dict=True)
        caches = [(name, outputs[name]) for name in _CACHE_NAMES if outputs.get(name) is not None]
        self._cache = dict(caches[:1]) if self._use_cache else {}
        return outputs.logits[:, -1]

    def _inputs(self, num_new: int) -> dict[str, Any]:
        """Return the arguments of the forward pass over the last `num_new` tokens of the rows."""
        num_rows, length = self.input_ids.shape
        accepted = inspect.signature(self._model.forward).parameters
        extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        if not self._use_cache:
            if "use_cache" in accepted:
                extra["use_cache"] = False
            return {"input_ids": self.input_ids, **extra}
        is_first = num_new == length
        if is_first:
            library_internals.prepare_cache(self._model, self._cache, num_rows, self._capacity)
        if "position_ids" in accepted:
            extra["position_ids"] = torch.arange(length, device=self.input_ids.device).expand(num_rows, -1)
        return self._model.prepare_inputs_for_generation(
            self.input_ids,
            next_sequence_length=None if is_first or not self._cache else num_new,
            is_first_iteration=is_first,
            use_cache=True,
            **extra,
            **self._cache,
        )

    def select(self, rows: Sequence[int]) -> None:
        """Keep `rows` in this order; a row may occur several times. Raises TypeError for an unknown type of cache."""
        indices = torch.tensor(rows, dtype=torch.int64, device=self._model.device)
        self.input_ids = self.input_ids[indices]
        self.requests = [self.requests[row] for row in rows]
        self._cache = {name: _select(cache, indices) for name, cache in self._cache.items()}

    def copies(self, number: int) -> Self:
        """Return a batch of `number` copies of this batch's only row."""
        copied = copy.copy(self)
        copied._cache = copy.deepcopy(self._cache)
        if number > 1:
            copied.select([0] * number)
        return copied


def _select(cache: Any, rows: Any) -> Any:
    if isinstance(cache, Cache):
        # `batch_select_indices` is missing in recurrent layers or ignores the state. `reorder_cache` includes the state.
        if any(hasattr(layer, "recurrent_states") for layer in cache.layers):
            cache.reorder_cache(rows)
        else:
            cache.batch_select_indices(rows)
        return cache
    if isinstance(cache, (list, tuple)) and all(isinstance(state, torch.Tensor) for state in cache):
        return [state.index_select(0, rows) for state in cache]
    raise TypeError(f"rows of a {type(cache).__name__} cannot be selected")


@dataclass(eq=False)
class TransformersBackend(Backend[AnyRequest]):
    """Backend that uses the model's own forward pass and cache. `prefix` is processed once if the cache can be copied.

    `cache_use.batch` must be False if several models work on a request, because all rows of a batch advance together.
    """

    cache_use: CacheUse = CacheUse()

    def __post_init__(self) -> None:
        self._prefix_batch: _Batch[AnyRequest] | None = None
        self._new: list[AnyRequest] = []
        self._batches: list[_Batch[AnyRequest]] = []

    @contextlib.contextmanager
    def prepared_model(self) -> Iterator[None]:
        """Context manager that switches the model to evaluation mode, default attention and prepacked weights."""
        with default_attention(self.model), prepacked_weights(self.model):
            yield

    @property
    def num_runnable(self) -> int:
        return sum(map(self.is_waiting, self._new)) + sum(map(self._num_waiting_in, self._batches))

    def add(self, request: AnyRequest) -> None:
        """Queue a request; a later step starts its sequence."""
        self._new.append(request)

    @torch.no_grad()
    def step(self) -> list[tuple[AnyRequest, int]]:
        """Run one forward pass over each batch with runnable requests; see `Backend.step`."""
        self._remove_ended()
        self._start_batches()
        next_tokens = []
        for batch in self._batches:
            if self._num_waiting_in(batch):
                next_tokens += self._advance(batch)
                if not self.cache_use.batch:
                    break  # without batching, advance only one request per step
        return next_tokens

    def _start_batches(self) -> None:
        """Start queued requests if no batch exists, or if the queue has at least half as many requests as there are slots.

        Without batching, start one request if no started request is runnable.
        """
        if not self.cache_use.batch:
            first = next(filter(self.is_waiting, self._new), None)
            if first is not None and not any(map(self._num_waiting_in, self._batches)):
                self._new.remove(first)
                self._start_batch([first])
            return
        while self._new and (not self._batches or len(self._new) >= self.num_slots // 2):
            lengths = accumulate(len(self.sequence(request).pending) for request in self._new)
            count = max(1, sum(length <= _MAX_PROMPT_TOKENS for length in lengths))
            requests, self._new = self._new[:count], self._new[count:]
            self._start_batch(requests)

    def _num_waiting_in(self, batch: _Batch[AnyRequest]) -> int:
        return sum(request is not None and self.is_waiting(request) for request in batch.requests)

    def _start_batch(self, requests: Sequence[AnyRequest]) -> None:
        """Add a batch of `requests`. If the cache can be copied, the batch starts with a copy of the processed prefix."""
        can_copy = self.cache_use.chunks and (self.cache_use.select or len(requests) == 1)
        if self.prefix and can_copy:
            if self._prefix_batch is None:
                self._prefix_batch = _Batch(self.model, 1, self.capacity, self.cache_use.cache)
                self._prefix_batch.forward([self.prefix])
            for request in requests:
                sequence = self.sequence(request)
                sequence.length = len(self.prefix)
                del sequence.pending[: sequence.length]
            batch = self._prefix_batch.copies(len(requests))
        else:
            batch = _Batch(self.model, len(requests), self.capacity, self.cache_use.cache)
        batch.requests = list(requests)
        self._batches.append(batch)

    def _advance(self, batch: _Batch[AnyRequest]) -> list[tuple[AnyRequest, int]]:
        sequences = [None if request is None else self.sequence(request) for request in batch.requests]
        num_new = 1
        if self.cache_use.chunks or batch.input_ids.shape[1] == 0:
            num_new = min(len(sequence.pending) for sequence in sequences if sequence is not None)
        logits = batch.forward(
            [[0] * num_new if sequence is None else sequence.pending[:num_new] for sequence in sequences]
        )
        active = [(row, request) for row, request in enumerate(batch.requests) if request is not None]
        for _, request in active:
            self.sequence(request).length += num_new
            del self.sequence(request).pending[:num_new]
        rows = [row for row, request in active if not self.sequence(request).pending]
        ready = [request for _, request in active if not self.sequence(request).pending]
        if not ready:
            return []
        ready_logits = logits if len(rows) == len(sequences) else logits[rows]
        return list(zip(ready, self.sampler(ready_logits, list(map(self.sequence, ready))), strict=True))

    def _remove_ended(self) -> None:
        self._new = [request for request in self._new if not self.is_released(request)]
        batches, self._batches = self._batches, []
        for batch in batches:
            batch.requests = [
                None if request is None or self.is_released(request) else request
                for request in batch.requests
            ]
            active_rows = [row for row, request in enumerate(batch.requests) if request is not None]
            if self.cache_use.select and 0 < len(active_rows) < len(batch.requests):
                batch.select(active_rows)
            if active_rows:
                self._batches.append(batch)
