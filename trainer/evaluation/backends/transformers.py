"""Transformers backend: the model's own forward pass and cache, for every family that `generate` can decode.

Batches have no padding, because recurrent layers ignore padding masks. The first forward pass processes as many tokens per
row as the shortest prompt has; each later one processes one token per row: the next pending token (of a longer prompt or a
calculator result), else the token just chosen. All rows of a batch therefore have the same length. Inputs and cache are
prepared by the hooks that `generate` itself calls.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic

import torch
from transformers import Cache, PreTrainedModel

from trainer.evaluation.backends import AnyRequest, Backend, SequenceState
from trainer.models.default_attention import (
    attention_of_submodules,
    restore_attention,
    set_attention,
    uses_sdpa,
)
from trainer.models.prepacked_weights import prepacked_weights
from trainer.runtime import library_internals

_CACHE_NAMES = ("past_key_values", "cache_params", "state")  # as in transformers.generation.utils
_TRANSFORMERS_ATTENTION = ("sdpa", "eager")
_MAX_PROMPT_TOKENS = 16384  # per batch, which bounds the activations of its first forward pass


@dataclass(frozen=True)
class CacheUse:
    """Ways of using the model's cache. Some are wrong for some families; backend_check.py tests them.

    batch: decode several requests in a batch. select: remove ended rows from the cache; else they are padded until the
    batch ends. chunks: process several tokens at once into a non-empty cache; else one at a time. cache: if False, every
    step processes the whole sequence again.
    """

    batch: bool = True
    select: bool = True
    chunks: bool = True
    cache: bool = True


# From fastest to slowest; the first one that passes the check is used.
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
    """Context manager that sets evaluation mode, and transformers' attention instead of packed or slot attention.

    attention: "sdpa" or "eager"; None keeps an attention of transformers, else takes the family's default.
    """
    training = model.training
    before = attention_of_submodules(model)
    is_changed = bool(attention) or any(name not in _TRANSFORMERS_ATTENTION for _, name in before)
    model.eval()
    try:
        if is_changed:
            set_attention(model, attention or _default(model))
            for submodel in model.modules():  # those that set_attention could not change
                if (
                    isinstance(submodel, PreTrainedModel)
                    and library_internals.get_attention(submodel.config) not in _TRANSFORMERS_ATTENTION
                ):
                    library_internals.set_attention(submodel.config, _default(submodel))
        yield
    finally:
        if is_changed:
            restore_attention(model, before)
        model.train(training)


def _default(model: PreTrainedModel) -> str:
    return "sdpa" if uses_sdpa(model) else "eager"


class _Rows:
    """Rows of tokens of equal length that a model has processed, with its cache."""

    def __init__(self, model: PreTrainedModel, num_rows: int, capacity: int, use_cache: bool) -> None:
        self._model: Any = model
        self._capacity = capacity
        self._use_cache = use_cache
        self._cache: dict[str, Any] = {}  # keyed by the model's argument name; {} without a cache
        self.input_ids = torch.zeros(num_rows, 0, dtype=torch.int64, device=model.device)

    def forward(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Process `tokens`, the same number per row; return logits [rows, vocabulary] of the last ones."""
        new = torch.tensor(tokens, dtype=torch.int64).to(self._model.device)
        self.input_ids = torch.cat([self.input_ids, new], dim=1)
        outputs = self._model(**self._inputs(new.shape[1]), return_dict=True)
        found = [(name, outputs[name]) for name in _CACHE_NAMES if outputs.get(name) is not None]
        self._cache = dict(found[:1]) if self._use_cache else {}
        logits: torch.Tensor = outputs.logits[:, -1]
        return logits

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
        inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(
            self.input_ids,
            next_sequence_length=None if is_first or not self._cache else num_new,
            is_first_iteration=is_first,
            use_cache=True,
            **extra,
            **self._cache,
        )
        return inputs

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; rows may repeat. Raises TypeError for an unknown type of cache."""
        indices = torch.tensor(rows, dtype=torch.int64, device=self._model.device)
        self.input_ids = self.input_ids[indices]
        self._cache = {name: _select(cache, indices) for name, cache in self._cache.items()}

    def copies(self, number: int) -> _Rows:
        """Return `number` rows, each a copy of this one row."""
        copied = copy.copy(self)
        copied._cache = copy.deepcopy(self._cache)
        if number > 1:
            copied.select([0] * number)
        return copied


def _select(cache: Any, rows: Any) -> Any:
    if isinstance(cache, Cache):
        # The `batch_select_indices` of recurrent layers is missing or leaves the state out; `reorder_cache` includes it.
        if any(hasattr(layer, "recurrent_states") for layer in cache.layers):
            cache.reorder_cache(rows)
        else:
            cache.batch_select_indices(rows)
        return cache
    if isinstance(cache, (list, tuple)) and all(isinstance(state, torch.Tensor) for state in cache):
        return [state.index_select(0, rows) for state in cache]
    raise TypeError(f"rows of a {type(cache).__name__} cannot be selected")


@dataclass(eq=False)
class _Batch(Generic[AnyRequest]):
    """Requests that are decoded together. `requests`: one per row, None for an ended one."""

    requests: Sequence[AnyRequest | None]
    rows: _Rows


@dataclass(eq=False)
class TransformersBackend(Backend[AnyRequest]):
    """Decodes one model with its own forward pass and cache. `prefix` is processed once if the cache can be copied.

    `cache_use.batch` must be False if requests also wait for other models, because all rows of a batch advance together.
    """

    cache_use: CacheUse = CacheUse()

    def __post_init__(self) -> None:
        self._prefix_rows: _Rows | None = None
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
        """Process tokens of waiting requests; return those without pending tokens left, with their next tokens."""
        self._remove_ended()
        self._start_batches()
        chosen = []
        for batch in self._batches:
            if self._num_waiting_in(batch):
                chosen += self._advance(batch)
                if not self.cache_use.batch:
                    break  # one request at a time, so that others need no cache yet
        return chosen

    def _start_batches(self) -> None:
        """Start batches of queued requests: immediately if no batch exists, else when half of the slots are free."""
        if not self.cache_use.batch:
            if not any(map(self._num_waiting_in, self._batches)):
                first = next(filter(self.is_waiting, self._new), None)
                if first is not None:
                    self._new.remove(first)
                    self._batches.append(_Batch([first], self._new_rows([first])))
            return
        while self._new and (not self._batches or len(self._new) >= self.num_slots // 2):
            lengths = accumulate(len(self.sequence(request).pending) for request in self._new)
            count = max(1, sum(length <= _MAX_PROMPT_TOKENS for length in lengths))
            requests, self._new = self._new[:count], self._new[count:]
            self._batches.append(_Batch(requests, self._new_rows(requests)))

    def _num_waiting_in(self, batch: _Batch[AnyRequest]) -> int:
        return sum(request is not None and self.is_waiting(request) for request in batch.requests)

    def _new_rows(self, requests: Sequence[AnyRequest]) -> _Rows:
        """Return rows for new requests, with the prefix already processed if the cache can be copied."""
        can_copy = self.cache_use.chunks and (self.cache_use.select or len(requests) == 1)
        if not (self.prefix and can_copy):
            return _Rows(self.model, len(requests), self.capacity, self.cache_use.cache)
        if self._prefix_rows is None:
            self._prefix_rows = _Rows(self.model, 1, self.capacity, self.cache_use.cache)
            self._prefix_rows.forward([self.prefix])
        for request in requests:
            sequence = self.sequence(request)
            sequence.length = len(self.prefix)
            del sequence.pending[: sequence.length]
        return self._prefix_rows.copies(len(requests))

    def _advance(self, batch: _Batch[AnyRequest]) -> list[tuple[AnyRequest, int]]:
        sequences = [None if request is None else self.sequence(request) for request in batch.requests]
        num_new = 1
        if self.cache_use.chunks or batch.rows.input_ids.shape[1] == 0:
            num_new = min(len(sequence.pending) for sequence in sequences if sequence is not None)
        logits = batch.rows.forward(
            [[0] * num_new if sequence is None else sequence.pending[:num_new] for sequence in sequences]
        )
        ready: list[tuple[int, SequenceState]] = []
        for row, sequence in enumerate(sequences):
            if sequence is not None:
                sequence.length += num_new
                del sequence.pending[:num_new]
                if not sequence.pending:
                    ready.append((row, sequence))
        if not ready:
            return []
        chosen = logits if len(ready) == len(sequences) else logits[[row for row, _ in ready]]
        tokens = self.sampler(chosen, [sequence for _, sequence in ready])
        requests = (batch.requests[row] for row, _ in ready)
        return [(o, token) for o, token in zip(requests, tokens, strict=True) if o is not None]

    def _remove_ended(self) -> None:
        self._new = [request for request in self._new if not self.is_released(request)]
        batches, self._batches = self._batches, []
        for batch in batches:
            batch.requests = [
                None if request is None or self.is_released(request) else request
                for request in batch.requests
            ]
            kept = [row for row, request in enumerate(batch.requests) if request is not None]
            if self.cache_use.select and 0 < len(kept) < len(batch.requests):
                batch.rows.select(kept)
                batch.requests = [batch.requests[row] for row in kept]
            if kept:
                self._batches.append(batch)
