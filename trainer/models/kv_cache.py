"""KV cache with one slot per sequence, and the inputs of a forward pass over this cache.

A forward pass takes one flat row of tokens, shape [1, tokens], from any number of sequences. There is no padding. One pass
can prefill a prompt while other slots decode (continuous batching: Yu et al., "Orca", OSDI 2022). slot_attention.py computes
the attention of each token over the token's slot.
"""

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch

_LENGTH_MULTIPLE = 8  # torch's memory-efficient attention on CUDA needs mask rows aligned to 8 elements


class KVCache:
    """Keys and values of every attention call of a forward pass, each [slots, key-value heads, capacity, head_dim].

    Tensors belong to attention calls, not to layers: a layer may call attention twice, and a looped model runs its layers
    several times. The first forward pass allocates the tensors.
    """

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.num_slots, self.capacity = num_slots, capacity
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cached keys and values of attention call `index`. The first use of an index allocates both tensors.

        `key` and `value` [1, key-value heads, tokens, head_dim] determine the shape, dtype and device of the tensors.
        """
        if index not in self._layers:
            # Zeros, because `empty` may hold NaN: masking adds -inf to scores after a sequence's end, and NaN + -inf is NaN.
            keys, values = (
                like.new_zeros(self.num_slots, like.shape[1], self.capacity, like.shape[3])
                for like in (key, value)
            )
            self._layers[index] = (keys, values)
        return self._layers[index]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` into slot `target`."""
        for tensor in chain.from_iterable(self._layers.values()):
            tensor[target, :, :length] = tensor[source, :, :length]


class PrefillChunk(NamedTuple):
    """Tokens `start:stop` of the flat row. They follow the `num_cached` tokens that `slot` holds."""

    start: int
    stop: int
    slot: int
    num_cached: int

    @property
    def end(self) -> int:
        """Number of cached tokens in the slot after this chunk."""
        return self.num_cached + self.stop - self.start


class VarlenBatch(NamedTuple):
    """Arguments of variable-length attention over chunks. New tokens have queries and keys; cached tokens have only keys."""

    cu_seqlens: torch.Tensor  # [chunks + 1] int32, cumulative numbers of queries
    cu_seqlens_k: torch.Tensor  # [chunks + 1] int32, cumulative numbers of keys
    key_slots: torch.Tensor  # [keys] int64, slot of each key in the cache
    key_positions: torch.Tensor  # [keys] int64, position of each key in its slot
    max_seqlen: int  # largest number of queries of a chunk
    max_seqlen_k: int  # largest number of keys of a chunk


@dataclass(frozen=True)
class ForwardBatch:
    """Inputs of one forward pass.

    A slot with new tokens is active. Any other slot with a sequence is parked. The flat row has two parts. The first part
    consists of `chunks`: the new tokens of each active slot without its last new token. The second part consists of the
    last new token of each active slot. Both parts are in slot order.

    The attention of the last tokens runs as one batch over the slots 0 to block - 1. In this batch a parked slot has a zero
    query, and the slot's result is dropped. To copy only the keys and values of the active slots would take longer.
    """

    cache: KVCache
    input_ids: torch.Tensor  # [1, tokens] int64
    positions: torch.Tensor  # [1, tokens] int64, position of each token in its own sequence
    slots: torch.Tensor  # [tokens] int64, slot of each token
    num_decode: int  # number of active slots
    block: int  # 1 + index of the last active slot
    active_slots: torch.Tensor | None  # [num_decode] int64; None: the slots 0 to block - 1 are all active
    max_seqlen: int  # at least the length of each active sequence after this pass, in tokens
    last_positions: torch.Tensor  # [block] int64, position of each slot's last token; 0 for a parked slot
    mask: torch.Tensor  # [block, 1, 1, max_seqlen], 0 inside a sequence and -inf after its end
    chunks: tuple[PrefillChunk, ...]
    # weak references to the (key, value) arguments of earlier `store` calls, by index of the attention call
    _stored: list[tuple[Any, Any]] = field(default_factory=list)

    def store(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache the keys and values of the new tokens; return all keys and values that this attention call has cached.

        If a layer passes the same tensors as an earlier layer (Gemma 4), both layers use the cache of the earlier layer.
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
        """Arguments of variable-length attention over the chunks. There must be at least one chunk."""
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
    """Return a batch that appends `new_tokens[i]` to the `lengths[i]` cached tokens of slot `active[i]`.

    Each slot in `active` must have at least one new token. `active` must be ascending and not empty.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    chunks: list[PrefillChunk] = []
    ends = [length + len(new) for length, new in zip(lengths, new_tokens, strict=True)]
    for slot, length, end, new in zip(active, lengths, ends, new_tokens, strict=True):
        if len(new) > 1:
            chunks.append(PrefillChunk(len(tokens), len(tokens) + len(new) - 1, slot, length))
            tokens += new[:-1]
            positions += range(length, end - 1)
            slots += [slot] * (len(new) - 1)
    num_decode, block = len(active), active[-1] + 1
    assert max(ends) <= cache.capacity and block <= cache.num_slots
    tokens += [new[-1] for new in new_tokens]
    positions += [end - 1 for end in ends]
    slots += active
    # Copy all three lists to the device in one transfer.
    numbers = torch.tensor([tokens, positions, slots], dtype=torch.int64).to(device)
    active_slots = numbers[2, len(tokens) - num_decode :] if num_decode < block else None
    last_positions = numbers[1, len(tokens) - num_decode :]
    # A parked slot attends to its first position. If all positions were masked, its result would be NaN.
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
    """Return a batch that appends one token to each of the slots 0 to block - 1.

    numbers: [2, block] int64 on the device, token and position of each slot. A slot attends to at most the first
    `max_seqlen` positions. All operations run on the device, so that a CUDA graph can contain them (cuda_graphs.py).
    Replays of the graph differ only in `numbers`.
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
    """Return the mask [block, 1, 1, max_seqlen] for last_positions [block]: 0 up to the last position, -inf after it."""
    is_hidden = torch.arange(max_seqlen, device=last_positions.device) > last_positions[:, None, None, None]
    return torch.zeros_like(is_hidden, dtype=dtype).masked_fill_(is_hidden, float("-inf"))
