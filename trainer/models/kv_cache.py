"""Generation slots: a key-value cache in which every slot holds one sequence, and the plan of a forward pass over it.

A forward pass takes one flat row of tokens, shape [1, tokens], from any number of sequences, so the linear layers
never see padding and a prompt can be read in the same pass in which other slots write their next token
(continuous batching: Yu et al., "Orca", OSDI 2022). How a token sees its own slot is in slot_attention.py.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

_LENGTH_MULTIPLE = 8  # CUDA's memory-efficient kernel wants rows of the mask aligned to 8 elements


class KVCache:
    """Keys and values of every attention call of a forward pass, each [slots, key-value heads, capacity, head size].

    They are numbered in the order of the calls, since a layer may call attention twice and a looped model runs its
    layers several times. Allocated on first use.
    """

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.num_slots = num_slots
        self.capacity = capacity
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cached keys and values of attention call `index`.

        `key`, `value` [1, key-value heads, tokens, head size] give shapes (which may differ), dtype and device.
        """
        if index not in self._layers:
            # Zeros, not empty: what lies behind a sequence's end is masked by adding -inf, and NaN would survive that.
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
    """Tokens `start:stop` of the flat row: they continue the sequence in `slot`, which holds `past` tokens already."""

    start: int
    stop: int
    slot: int
    num_cached: int

    @property
    def end(self) -> int:
        """Length of the sequence with the piece."""
        return self.num_cached + self.stop - self.start


@dataclass(frozen=True)
class VarlenBatch:
    """All pieces of a pass as one kernel takes them: their queries side by side, and so their keys, from position 0 on."""

    cu_seqlens: torch.Tensor  # [pieces + 1] int32, where the queries of each begin, and the total
    cu_seqlens_k: torch.Tensor  # [pieces + 1] int32, the same of its keys
    key_slots: torch.Tensor  # [keys] int64, where they are in the cache
    key_positions: torch.Tensor  # [keys] int64
    max_seqlen: int  # queries of a piece
    max_seqlen_k: int  # keys of a piece


@dataclass(frozen=True)
class ForwardBatch:
    """What one forward pass adds to which slot.

    The flat row ends with exactly one token for each slot that takes part, in slot order: the newest token of its
    sequence, whose attention runs as one batch over the slots. Before them come the `pieces`: whatever else is new in
    a slot (a prompt, or forced tokens) without its newest token.

    A slot that does not take part (a parked one) has no token in the row. If it lies among the others, it is in the
    batch of the attention alone, with an empty query whose result is dropped: copying keys and values to have the
    others side by side would cost more. (In a decode step, `plan_decode`, all of a block take part.)
    """

    cache: KVCache
    input_ids: torch.Tensor  # [1, tokens] int64
    positions: torch.Tensor  # [1, tokens] int64, the place of a token in its own sequence
    slots: torch.Tensor  # [tokens] int64
    num_decode: int  # slots that take part
    block: int  # slots 0..block-1 hold them
    rows: torch.Tensor | None  # [num_newest] int64, which of the block take part; None: all of them
    longest: int  # length of the longest of their sequences after this step, rounded up
    last_positions: torch.Tensor  # [block] int64, of each slot's newest token; 0 for a parked slot
    mask: torch.Tensor  # [block, 1, 1, longest], 0 inside a sequence and -inf behind its end
    chunks: tuple[PrefillChunk, ...]
    _stored: list[tuple[Any, Any]] = field(
        default_factory=list
    )  # weak references to keys and values, by call

    def store(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the row's keys and values into their slots; return all cached ones of this attention call.

        A layer that shares the keys and values of an earlier one (Gemma 4) shares its part of the cache, too.
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
        """The pieces, at least one, for all layers: made when the first one asks."""
        device = self.input_ids.device
        keys = [piece.end for piece in self.chunks]
        bounds = [0, *(piece.stop for piece in self.chunks)]
        starts = list(accumulate(keys, initial=0))
        slots = [piece.slot for piece in self.chunks]
        numbers = torch.tensor([slots, starts[:-1], keys]).to(device)
        # output_size: the number of keys is known, the device need not be asked for it.
        slot_and_start = numbers[:2].repeat_interleave(numbers[2], dim=1, output_size=starts[-1])
        both_bounds = torch.tensor([bounds, starts], dtype=torch.int32).to(device)
        return VarlenBatch(
            cu_seqlens=both_bounds[0],
            cu_seqlens_k=both_bounds[1],
            key_slots=slot_and_start[0],
            key_positions=torch.arange(starts[-1], device=device) - slot_and_start[1],
            max_seqlen=max(piece.stop - piece.start for piece in self.chunks),
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
    """Plan a forward pass: slot `active[i]` holds `lengths[i]` tokens already and gets `new_tokens[i]`, at least one.

    `active` ascends; it has at least one slot.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    pieces: list[PrefillChunk] = []
    for slot, length, new in zip(active, lengths, new_tokens, strict=True):
        if len(new) > 1:
            start = len(tokens)
            tokens += new[:-1]
            positions += range(length, length + len(new) - 1)
            slots += [slot] * (len(new) - 1)
            pieces.append(PrefillChunk(start, len(tokens), slot, length))
    num_newest, block = len(active), active[-1] + 1
    ends = [length + len(new) for length, new in zip(lengths, new_tokens, strict=True)]
    longest = max(ends)
    assert longest <= cache.capacity and block <= cache.num_slots
    tokens += [new[-1] for new in new_tokens]
    positions += [end - 1 for end in ends]
    slots += active
    # One transfer to the device for the three rows of numbers.
    numbers = torch.tensor([tokens, positions, slots], dtype=torch.int64).to(device)
    rows = numbers[2, len(tokens) - num_newest :] if num_newest < block else None
    last_positions = numbers[1, len(tokens) - num_newest :]
    if rows is not None:  # a parked slot sees its first position, so that its dropped row has no NaN
        last_positions = last_positions.new_zeros(block).index_copy_(0, rows, last_positions)
    longest = min(-(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, cache.capacity)
    return ForwardBatch(
        cache=cache,
        input_ids=numbers[:1],
        positions=numbers[1:2],
        slots=numbers[2],
        num_decode=num_newest,
        block=block,
        rows=rows,
        longest=longest,
        last_positions=last_positions,
        mask=_mask(last_positions, longest, dtype),
        chunks=tuple(pieces),
    )


def prepare_decode(cache: KVCache, numbers: torch.Tensor, longest: int, dtype: torch.dtype) -> ForwardBatch:
    """Plan a pass in which each of the slots 0..block-1 gets one token, in operations of the device alone.

    numbers: [2, block] int64 on the device, each slot's token and its position, which is all that may change from one
    such pass to the next (decode_graphs.py). A slot sees at most `longest` positions.
    """
    block = numbers.shape[1]
    return ForwardBatch(
        cache=cache,
        input_ids=numbers[:1],
        positions=numbers[1:],
        slots=torch.arange(block, device=numbers.device),
        num_decode=block,
        block=block,
        rows=None,
        longest=longest,
        last_positions=numbers[1],
        mask=_mask(numbers[1], longest, dtype),
        chunks=(),
    )


def _mask(last_positions: torch.Tensor, longest: int, dtype: torch.dtype) -> torch.Tensor:
    """last_positions [block] -> [block, 1, 1, longest]: 0 up to the last position of a sequence, -inf behind it."""
    device = last_positions.device
    behind = torch.arange(longest, device=device) > last_positions[:, None]
    mask = torch.zeros(behind.shape, dtype=dtype, device=device).masked_fill_(behind, float("-inf"))
    return mask[:, None, None, :]
