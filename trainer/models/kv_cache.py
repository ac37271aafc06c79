"""KV cache of generation slots, one sequence each, and the inputs of a forward pass over it.

A forward pass takes one flat row of tokens, shape [1, tokens], from any number of sequences: no padding, and one pass
can prefill a prompt while other slots decode (continuous batching: Yu et al., "Orca", OSDI 2022). slot_attention.py
computes the attention of each token over its own slot.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

_LENGTH_MULTIPLE = 8  # CUDA's memory-efficient kernel needs mask rows aligned to 8 elements


class KVCache:
    """Keys and values of every attention call of a forward pass, each [slots, key-value heads, capacity, head_dim].

    The index is the number of the attention call, since a layer may call attention twice and a looped model runs its
    layers several times. Allocated on first use.
    """

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.num_slots = num_slots
        self.capacity = capacity
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cached keys and values of attention call `index`.

        `key`, `value` [1, key-value heads, tokens, head_dim] give shapes (which may differ), dtype and device.
        """
        if index not in self._layers:
            # Zeros, not empty: positions after a sequence's end are masked by adding -inf, which NaN would survive.
            keys, values = (
                like.new_zeros(self.num_slots, like.shape[1], self.capacity, like.shape[3])
                for like in (key, value)
            )
            self._layers[index] = (keys, values)
        return self._layers[index]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` over those of slot `target`."""
        for keys, values in self._layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens `start:stop` of the flat row, which continue the sequence of `num_cached` tokens in `slot`."""

    start: int
    stop: int
    slot: int
    num_cached: int

    @property
    def end(self) -> int:
        """Return the length of the sequence after this chunk."""
        return self.num_cached + self.stop - self.start


@dataclass(frozen=True)
class VarlenBatch:
    """Arguments of variable-length attention over all chunks of a pass; the keys of a chunk start at position 0."""

    cu_seqlens: torch.Tensor  # [chunks + 1] int32, cumulated numbers of queries
    cu_seqlens_k: torch.Tensor  # [chunks + 1] int32, cumulated numbers of keys
    key_slots: torch.Tensor  # [keys] int64, slot of each key in the cache
    key_positions: torch.Tensor  # [keys] int64
    max_seqlen: int  # queries of a chunk
    max_seqlen_k: int  # keys of a chunk


@dataclass(frozen=True)
class ForwardBatch:
    """Inputs of one forward pass.

    The flat row ends with one token for each active slot, in slot order: the last token of its sequence, whose attention
    runs as one batch over the slots. Before them come the `chunks`: the other new tokens of a slot (a prompt, or forced
    tokens).

    A parked slot has no token in the row. If its index is below an active one's, it is in the batch of the attention
    with a zero query whose result is dropped: gathering the keys and values of the active slots would cost more. In a
    pass from `prepare_decode` all slots of the block are active.
    """

    cache: KVCache
    input_ids: torch.Tensor  # [1, tokens] int64
    positions: torch.Tensor  # [1, tokens] int64, position of each token in its own sequence
    slots: torch.Tensor  # [tokens] int64
    num_decode: int  # active slots
    block: int  # 1 + the last active slot
    active_slots: torch.Tensor | None  # [num_decode] int64; None: all slots of the block
    max_seqlen: int  # tokens of the longest active sequence after this pass, rounded up
    last_positions: torch.Tensor  # [block] int64, position of each slot's last token; 0 for a parked slot
    mask: torch.Tensor  # [block, 1, 1, max_seqlen], 0 inside a sequence and -inf after its end
    chunks: tuple[PrefillChunk, ...]
    # Weak references to the keys and values of each attention call.
    _stored: list[tuple[Any, Any]] = field(default_factory=list)

    def store(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the row's keys and values into their slots; return all cached ones of this attention call.

        A layer that reuses the keys and values of an earlier one (Gemma 4) uses the earlier layer's cache.
        """
        for index, (earlier_key, earlier_value) in enumerate(self._stored):
            if earlier_key() is key and earlier_value() is value:
                return self.cache.layer(index, key, value)
        keys, values = self.cache.layer(len(self._stored), key, value)
        self._stored.append((weakref.ref(key), weakref.ref(value)))
        positions = self.positions[0]
        keys[self.slots, :, positions] = key[0].transpose(0, 1)
        values[self.slots, :, positions] = value[0].transpose(0, 1)
        return keys, values

    @functools.cached_property
    def varlen_batch(self) -> VarlenBatch:
        """Return the arguments of variable-length attention over the chunks, of which there must be at least one."""
        device = self.input_ids.device
        keys = [chunk.end for chunk in self.chunks]
        cu_seqlens = [0, *(chunk.stop for chunk in self.chunks)]
        cu_seqlens_k = list(accumulate(keys, initial=0))
        slots = [chunk.slot for chunk in self.chunks]
        numbers = torch.tensor([slots, cu_seqlens_k[:-1], keys]).to(device)
        # output_size avoids a synchronisation with the device.
        slot_and_start = numbers[:2].repeat_interleave(numbers[2], dim=1, output_size=cu_seqlens_k[-1])
        cumulated = torch.tensor([cu_seqlens, cu_seqlens_k], dtype=torch.int32).to(device)
        return VarlenBatch(
            cu_seqlens=cumulated[0],
            cu_seqlens_k=cumulated[1],
            key_slots=slot_and_start[0],
            key_positions=torch.arange(cu_seqlens_k[-1], device=device) - slot_and_start[1],
            max_seqlen=max(chunk.stop - chunk.start for chunk in self.chunks),
            max_seqlen_k=max(keys),
        )


def prepare_prefill(
    cache: KVCache,
    active: Sequence[int],
    lengths: Sequence[int],
    new_tokens: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
) -> ForwardBatch:
    """Return a batch that appends `new_tokens[i]`, at least one, to the `lengths[i]` cached tokens of slot `active[i]`.

    `active` must be ascending and not empty.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    chunks: list[PrefillChunk] = []
    for slot, length, new in zip(active, lengths, new_tokens, strict=True):
        if len(new) > 1:
            start = len(tokens)
            tokens += new[:-1]
            positions += range(length, length + len(new) - 1)
            slots += [slot] * (len(new) - 1)
            chunks.append(PrefillChunk(start, len(tokens), slot, length))
    num_decode, block = len(active), active[-1] + 1
    ends = [length + len(new) for length, new in zip(lengths, new_tokens, strict=True)]
    assert max(ends) <= cache.capacity and block <= cache.num_slots
    tokens += [new[-1] for new in new_tokens]
    positions += [end - 1 for end in ends]
    slots += active
    # One transfer to the device for all three.
    numbers = torch.tensor([tokens, positions, slots], dtype=torch.int64).to(device)
    active_slots = numbers[2, len(tokens) - num_decode :] if num_decode < block else None
    last_positions = numbers[1, len(tokens) - num_decode :]
    # A parked slot attends to its first position, so that its dropped result has no NaN.
    if active_slots is not None:
        last_positions = last_positions.new_zeros(block).index_copy_(0, active_slots, last_positions)
    max_seqlen = min(-(-max(ends) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, cache.capacity)
    return ForwardBatch(
        cache=cache,
        input_ids=numbers[:1],
        positions=numbers[1:2],
        slots=numbers[2],
        num_decode=num_decode,
        block=block,
        active_slots=active_slots,
        max_seqlen=max_seqlen,
        last_positions=last_positions,
        mask=_mask(last_positions, max_seqlen, dtype),
        chunks=tuple(chunks),
    )


def prepare_decode(
    cache: KVCache, numbers: torch.Tensor, max_seqlen: int, dtype: torch.dtype
) -> ForwardBatch:
    """Return a batch that appends one token to each of the slots 0..block-1, with device operations only.

    numbers: [2, block] int64 on the device, token and position of each slot: all that changes between replays of a CUDA
    graph (cuda_graphs.py). A slot attends to at most `max_seqlen` positions.
    """
    block = numbers.shape[1]
    return ForwardBatch(
        cache=cache,
        input_ids=numbers[:1],
        positions=numbers[1:],
        slots=torch.arange(block, device=numbers.device),
        num_decode=block,
        block=block,
        active_slots=None,
        max_seqlen=max_seqlen,
        last_positions=numbers[1],
        mask=_mask(numbers[1], max_seqlen, dtype),
        chunks=(),
    )


def _mask(last_positions: torch.Tensor, max_seqlen: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask [block, 1, 1, max_seqlen] for last_positions [block]: 0 up to the last position, -inf after it."""
    device = last_positions.device
    is_hidden = torch.arange(max_seqlen, device=device) > last_positions[:, None]
    mask = torch.zeros(is_hidden.shape, dtype=dtype, device=device).masked_fill_(is_hidden, float("-inf"))
    return mask[:, None, None, :]
