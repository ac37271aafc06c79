"""Decoding with the model's own forward pass and its own cache: every family that transformers' `generate` can decode.

No family's padding mask is relied on (recurrent layers ignore it). The problems of a batch are read without padding: first
as many tokens at once as the shortest prompt has, then one token a step from every problem, the next pending one (of a
longer prompt, or what the calculator gives) where there is one, else the one just chosen. So all rows are equally long.
The model's inputs and cache are prepared by the hooks that `generate` itself calls.
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
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from trainer.evaluation.backends import AnyRequest, Sampler, SequenceState
from trainer.models.default_attention import (
    attention_of_submodules,
    restore_attention,
    set_attention,
    uses_sdpa,
)
from trainer.models.prepacked_weights import prepacked_weights

_CACHE_NAMES = ("past_key_values", "cache_params", "state")  # as in transformers.generation.utils
_OF_TRANSFORMERS = ("sdpa", "eager")
_MAX_PROMPT_TOKENS = 16384  # of the prompts of a batch, which bounds the activations of its first pass


@dataclass(frozen=True)
class CacheUse:
    """How the model's cache may be used. Not all is right for all families; backend_check.py finds out what is.

    batch: several problems in a batch. select: rows that have ended are removed from the cache, else they are fed until
    the last one ends. chunks: several tokens are read at once into a cache that holds some, else one at a time. cache:
    without one, every step reads the whole text again.
    """

    batch: bool = True
    select: bool = True
    chunks: bool = True
    cache: bool = True


# From the fastest on: what is tried until the answers are the model's own.
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
    """Context manager: evaluation mode, and an attention of transformers.

    A model that has one keeps it; one of ours (packed, slots) is replaced by the family's default. attention: this one
    instead, "sdpa" or "eager".
    """
    training = model.training
    before = attention_of_submodules(model)
    changes = bool(attention) or any(name not in _OF_TRANSFORMERS for _, name in before)
    model.eval()
    try:
        if changes:
            set_attention(model, attention or _default(model))
            for part in model.modules():  # a part that set_attention could not change
                if (
                    isinstance(part, PreTrainedModel)
                    and part.config._attn_implementation not in _OF_TRANSFORMERS
                ):
                    part.config._attn_implementation = _default(part)
        yield
    finally:
        if changes:
            restore_attention(model, before)
        model.train(training)


def _default(model: PreTrainedModel) -> str:
    return "sdpa" if uses_sdpa(model) else "eager"


class _Rows:
    """Equally long rows of tokens that a model has read, with its cache of them."""

    def __init__(self, model: PreTrainedModel, num_rows: int, capacity: int, use_cache: bool) -> None:
        self._model: Any = model
        self._capacity = capacity
        self._use_cache = use_cache
        self._cache: dict[str, Any] = {}  # under the name that the model has for it; {} if it makes none
        self.input_ids = torch.zeros(num_rows, 0, dtype=torch.int64, device=model.device)

    def read(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read `tokens`, equally many in every row; return logits [rows, vocabulary] of the last ones."""
        new = torch.tensor(tokens, dtype=torch.int64).to(self._model.device)
        self.input_ids = torch.cat([self.input_ids, new], dim=1)
        outputs = self._model(**self._inputs(new.shape[1]), return_dict=True)
        found = [(name, outputs[name]) for name in _CACHE_NAMES if outputs.get(name) is not None]
        self._cache = dict(found[:1]) if self._use_cache else {}
        logits: torch.Tensor = outputs.logits[:, -1]
        return logits

    def _inputs(self, num_new: int) -> dict[str, Any]:
        """Return the arguments of the forward pass that reads the last `num_new` tokens of the rows."""
        num_rows, length = self.input_ids.shape
        accepted = inspect.signature(self._model.forward).parameters
        more: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        if not self._use_cache:
            if "use_cache" in accepted:
                more["use_cache"] = False
            return {"input_ids": self.input_ids, **more}
        is_first = num_new == length
        if is_first:
            self._model._prepare_cache_for_generation(
                GenerationConfig(), self._cache, GenerationMode.GREEDY_SEARCH, num_rows, self._capacity
            )
        if "position_ids" in accepted:
            more["position_ids"] = torch.arange(length, device=self.input_ids.device).expand(num_rows, -1)
        inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(
            self.input_ids,
            next_sequence_length=None if is_first or not self._cache else num_new,
            is_first_iteration=is_first,
            use_cache=True,
            **more,
            **self._cache,
        )
        return inputs

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; a row may be taken more than once. Raises TypeError for an unknown cache."""
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
        # Layers with a recurrent state have no `batch_select_indices` of their own, or one that leaves the state out;
        # caches that are not made of layers alone override it.
        if any(hasattr(layer, "recurrent_states") for layer in cache.layers):
            cache.reorder_cache(rows)
        else:
            cache.batch_select_indices(rows)
        return cache
    if isinstance(cache, (list, tuple)) and all(isinstance(state, torch.Tensor) for state in cache):
        return [state.index_select(0, rows) for state in cache]
    raise TypeError(f"rows of a {type(cache).__name__} cannot be selected")


class _Batch(Generic[AnyRequest]):
    """Problems that are decoded together. `occupants`: one for each row, None where a problem has left."""

    def __init__(self, occupants: Sequence[AnyRequest], rows: _Rows) -> None:
        self.occupants: list[AnyRequest | None] = list(occupants)
        self.rows = rows


class TransformersBackend(Generic[AnyRequest]):
    """Next tokens of one model, by its own forward pass and cache."""

    def __init__(
        self,
        seat: int,
        model: PreTrainedModel,
        num_slots: int,
        capacity: int,
        choose: Sampler,
        prefix: Sequence[int] = (),
        cache_use: CacheUse = CacheUse(),
    ) -> None:
        """`seat`: which of an occupant's feeds is read here. `capacity`: longest sequence in tokens.

        `choose`: logits [feeds, vocabulary] -> tokens. `prefix`: tokens that all texts begin with; where the cache allows
        it they are read once. `cache_use.batch` must be False if problems also wait for other models: in a batch all
        read at the same time.
        """
        self.model = model
        self._seat = seat
        self._num_slots = num_slots
        self._capacity = capacity
        self._choose = choose
        self._prefix = list(prefix)
        self._prefix_rows: _Rows | None = None
        self._use = cache_use
        self._new: list[AnyRequest] = []
        self._batches: list[_Batch[AnyRequest]] = []

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Context manager that switches the model to evaluation mode, its default attention and blocked weights."""
        with default_attention(self.model), prepacked_weights(self.model):
            yield

    @property
    def num_waiting(self) -> int:
        """The number of problems whose next token is this model's to choose."""
        begun = (occupant for batch in self._batches for occupant in batch.occupants)
        return sum(
            occupant is not None and occupant.next_model == self._seat for occupant in (*self._new, *begun)
        )

    def add(self, occupant: AnyRequest) -> None:
        """Take a new problem; its text is begun in a later step."""
        self._new.append(occupant)

    @torch.no_grad()
    def step(self) -> list[tuple[AnyRequest, int]]:
        """Read tokens of the problems that wait; return those that have read all of theirs, with their next tokens."""
        self._remove_ended()
        self._begin()
        found = []
        for batch in self._batches:
            if any(self._waits(occupant) for occupant in batch.occupants):
                found += self._advance(batch)
                if not self._use.batch:
                    break  # one at a time: caches of problems that have not begun take no memory
        return found

    def _begin(self) -> None:
        """Make batches of new problems: at once if none is under way, else when half of the slots have come free."""
        if not self._use.batch:
            if not any(self._waits(occupant) for batch in self._batches for occupant in batch.occupants):
                first = next((occupant for occupant in self._new if self._waits(occupant)), None)
                if first is not None:
                    self._new.remove(first)
                    self._batches.append(_Batch([first], self._begun([first])))
            return
        while self._new and (not self._batches or len(self._new) >= self._num_slots // 2):
            lengths = accumulate(len(occupant.sequences[self._seat].pending) for occupant in self._new)
            taken = max(1, sum(length <= _MAX_PROMPT_TOKENS for length in lengths))
            occupants, self._new = self._new[:taken], self._new[taken:]
            self._batches.append(_Batch(occupants, self._begun(occupants)))

    def _waits(self, occupant: AnyRequest | None) -> bool:
        return occupant is not None and occupant.next_model == self._seat

    def _begun(self, occupants: Sequence[AnyRequest]) -> _Rows:
        """Return rows for new problems, which hold the prefix already if the cache can be copied."""
        may_copy = self._use.chunks and (self._use.select or len(occupants) == 1)
        if not (self._prefix and may_copy):
            return _Rows(self.model, len(occupants), self._capacity, self._use.cache)
        if self._prefix_rows is None:
            self._prefix_rows = _Rows(self.model, 1, self._capacity, self._use.cache)
            self._prefix_rows.read([self._prefix])
        for occupant in occupants:
            feed = occupant.sequences[self._seat]
            feed.length = len(self._prefix)
            del feed.pending[: feed.length]
        return self._prefix_rows.copies(len(occupants))

    def _advance(self, batch: _Batch[AnyRequest]) -> list[tuple[AnyRequest, int]]:
        feeds = [None if occupant is None else occupant.sequences[self._seat] for occupant in batch.occupants]
        num_new = 1
        if self._use.chunks or batch.rows.input_ids.shape[1] == 0:
            num_new = min(len(feed.pending) for feed in feeds if feed is not None)
        logits = batch.rows.read(
            [[0] * num_new if feed is None else feed.pending[:num_new] for feed in feeds]
        )
        ready: list[tuple[int, SequenceState]] = []
        for row, feed in enumerate(feeds):
            if feed is not None:
                feed.length += num_new
                del feed.pending[:num_new]
                if not feed.pending:
                    ready.append((row, feed))
        if not ready:
            return []
        chosen = logits if len(ready) == len(feeds) else logits[[row for row, _ in ready]]
        tokens = self._choose(chosen, [feed for _, feed in ready])
        occupants = (batch.occupants[row] for row, _ in ready)
        return [(o, token) for o, token in zip(occupants, tokens, strict=True) if o is not None]

    def _remove_ended(self) -> None:
        self._new = [occupant for occupant in self._new if not self._has_left(occupant)]
        for batch in self._batches:
            left = [occupant is None or self._has_left(occupant) for occupant in batch.occupants]
            if self._use.select and any(left) and not all(left):
                kept = [row for row, has_left in enumerate(left) if not has_left]
                batch.rows.select(kept)
                batch.occupants = [batch.occupants[row] for row in kept]
            else:
                batch.occupants = [
                    None if has_left else occupant
                    for occupant, has_left in zip(batch.occupants, left, strict=True)
                ]
        self._batches = [batch for batch in self._batches if any(o is not None for o in batch.occupants)]

    def _has_left(self, occupant: AnyRequest) -> bool:
        return occupant.next_model is None or occupant.sequences[self._seat].is_done
