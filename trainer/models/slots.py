"""Attention over generation slots: a key-value cache in which every slot holds one sequence of its own length.

A forward pass takes one flat row of tokens, shape [1, tokens], from any number of sequences, so the linear layers
never see padding and a prompt can be read in the same pass in which other slots write their next token
(continuous batching: Yu et al., "Orca", OSDI 2022). Registered with transformers as the attention "slots"; having
no mask function of its own, transformers builds no mask for it, and `slot_step=` rides in the keyword arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from trainer.errors import UserError
from trainer.models.attention_kernels import leave_out_cudnn

IMPLEMENTATION = "slots"
_LENGTH_MULTIPLE = 8  # CUDA's memory-efficient kernel wants rows of the mask aligned to 8 elements
_NOT_SUPPORTED = ("softcap", "position_bias", "s_aux", "head_mask")


class SlotCache:
    """Keys and values of every layer, each [slots, key-value heads, capacity, head size], allocated on first use."""

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.num_slots = num_slots
        self.capacity = capacity
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache of layer `index`; `like` [1, key-value heads, tokens, head size] gives shape, dtype and device."""
        if index not in self._layers:
            shape = (self.num_slots, like.shape[1], self.capacity, like.shape[3])
            # Zeros, not empty: what lies behind a sequence's end is masked by adding -inf, and NaN would survive that.
            self._layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[index]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` over those of slot `target`."""
        for keys, values in self._layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]


@dataclass(frozen=True)
class Piece:
    """Tokens `start:stop` of the flat row: they continue the sequence in `slot`, which holds `past` tokens already."""

    start: int
    stop: int
    slot: int
    past: int


@dataclass(frozen=True)
class SlotStep:
    """What one forward pass adds to which slot.

    The flat row ends with exactly one token for each slot that takes part, in slot order: the newest token of its
    sequence, whose attention runs as one batch over the slots. Before them come the `pieces`: whatever else is new in
    a slot (a prompt, or forced tokens) without its newest token.

    A slot that does not take part (a parked one) has no token in the row. If it lies among the others, it is in the
    batch of the attention alone, with an empty query whose result is dropped: copying keys and values to have the
    others side by side would cost more.
    """

    cache: SlotCache
    input_ids: torch.Tensor  # [1, tokens] int64
    positions: torch.Tensor  # [1, tokens] int64, the place of a token in its own sequence
    slots: torch.Tensor  # [tokens] int64
    num_newest: int  # slots that take part
    block: int  # slots 0..block-1 hold them
    rows: torch.Tensor | None  # [num_newest] int64, which of the block take part; None: all of them
    longest: int  # length of the longest of their sequences after this step, rounded up
    mask: torch.Tensor  # [block, 1, 1, longest], 0 inside a sequence and -inf behind its end
    pieces: tuple[Piece, ...]


def plan_step(
    cache: SlotCache,
    active: Sequence[int],
    lengths: Sequence[int],
    new_tokens: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
) -> SlotStep:
    """Plan a forward pass: slot `active[i]` holds `lengths[i]` tokens already and gets `new_tokens[i]`, at least one.

    `active` ascends; it has at least one slot.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    pieces: list[Piece] = []
    for slot, length, new in zip(active, lengths, new_tokens, strict=True):
        if len(new) > 1:
            start = len(tokens)
            tokens += new[:-1]
            positions += range(length, length + len(new) - 1)
            slots += [slot] * (len(new) - 1)
            pieces.append(Piece(start, len(tokens), slot, length))
    num_newest, block = len(active), active[-1] + 1
    ends = [length + len(new) for length, new in zip(lengths, new_tokens, strict=True)]
    longest = max(ends)
    assert longest <= cache.capacity and block <= cache.num_slots
    tokens += [new[-1] for new in new_tokens]
    positions += [end - 1 for end in ends]
    slots += active
    longest = min(-(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, cache.capacity)
    # One transfer to the device for the three rows of numbers.
    numbers = torch.tensor([tokens, positions, slots], dtype=torch.int64).to(device)
    rows = numbers[2, len(tokens) - num_newest :] if num_newest < block else None
    last_positions = numbers[1, len(tokens) - num_newest :]
    if rows is not None:  # a parked slot sees its first position, so that its dropped row has no NaN
        last_positions = last_positions.new_zeros(block).index_copy_(0, rows, last_positions)
    behind = torch.arange(longest, device=device) > last_positions[:, None]
    mask = torch.zeros(behind.shape, dtype=dtype, device=device).masked_fill_(behind, float("-inf"))
    return SlotStep(
        cache=cache,
        input_ids=numbers[:1],
        positions=numbers[1:2],
        slots=numbers[2],
        num_newest=num_newest,
        block=block,
        rows=rows,
        longest=longest,
        mask=mask[:, None, None, :],
        pieces=tuple(pieces),
    )


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    slot_step: SlotStep | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each token over its own slot. query [1, heads, tokens, head size] -> [1, tokens, heads, head size]."""
    if slot_step is None:
        raise RuntimeError("attention over slots was called without slot_step=")
    step = slot_step
    _refuse_what_is_not_supported(step.cache.capacity, other)
    keys, values = step.cache.layer(module.layer_idx, key)  # type: ignore[arg-type]
    positions = step.positions[0]
    keys[step.slots, :, positions] = key[0].transpose(0, 1)
    values[step.slots, :, positions] = value[0].transpose(0, 1)

    num_heads, num_tokens, head_size = query.shape[1:]
    outputs = [_piece_attention(piece, query, key, value, keys, values, scaling) for piece in step.pieces]
    newest = query[0, :, num_tokens - step.num_newest :].transpose(0, 1)
    if step.rows is not None:
        newest = newest.new_zeros(step.block, *newest.shape[1:]).index_copy_(0, step.rows, newest)
    # Grouped queries become rows of one query matrix: no repetition of keys and values, and one mask for all heads.
    attended = scaled_dot_product_attention(
        newest.reshape(step.block, keys.shape[1], num_heads // keys.shape[1], head_size),
        keys[: step.block, :, : step.longest],
        values[: step.block, :, : step.longest],
        attn_mask=step.mask,
        scale=scaling,
    ).reshape(step.block, num_heads, head_size)
    outputs.append(attended if step.rows is None else attended[step.rows])
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined[None], None


def _piece_attention(
    piece: Piece,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of several new tokens of one slot: [tokens of the piece, heads, head size]."""
    new = slice(piece.start, piece.stop)
    rows = query[:, :, new]
    if piece.past == 0:
        attended = scaled_dot_product_attention(
            rows, key[:, :, new], value[:, :, new], is_causal=True, scale=scaling, enable_gqa=True
        )
    else:
        end = piece.past + piece.stop - piece.start
        visible = torch.ones(rows.shape[2], end, dtype=torch.bool, device=rows.device).tril_(piece.past)
        attended = scaled_dot_product_attention(
            rows,
            keys[piece.slot, None, :, :end],
            values[piece.slot, None, :, :end],
            attn_mask=visible,
            scale=scaling,
            enable_gqa=True,
        )
    return attended[0].transpose(0, 1)


def _refuse_what_is_not_supported(capacity: int, other: dict[str, Any]) -> None:
    window = other.get("sliding_window")
    if window is not None and window < capacity:
        raise UserError(
            f"the model's sliding window of {window} tokens is shorter than the {capacity} tokens a sequence may have, "
            "and sliding windows are not supported here; lower max_new_tokens"
        )
    for name in _NOT_SUPPORTED:
        if other.get(name) is not None:
            raise UserError(f"the model's attention uses {name}, which generation in slots does not support")


@contextlib.contextmanager
def slot_attention_of(model: PreTrainedModel) -> Iterator[None]:
    """Switch `model` to attention over slots and to evaluation mode; on exit both are as they were."""
    leave_out_cudnn()
    before = model.config._attn_implementation
    training = model.training
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise UserError(
            f"{type(model).__name__} does not let its attention be replaced, which generation in slots needs"
        )
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        model.set_attn_implementation(before)


AttentionInterface.register(IMPLEMENTATION, slot_attention)
