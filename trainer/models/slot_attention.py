"""Attention over generation slots (slots.py), for any model of transformers whose attention can be replaced.

Registered with transformers as the attention "slots"; having no mask function of its own, transformers builds no mask
for it and does not look into the positions, and `slot_step=` rides in the keyword arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from trainer.errors import UserError
from trainer.models.attention_kernels import leave_out_cudnn
from trainer.models.packed_attention import has_kernel, varlen
from trainer.models.slots import Piece, SlotStep

IMPLEMENTATION = "slots"
_NOT_SUPPORTED = ("softcap", "position_bias", "s_aux", "head_mask")


def newest_logits(model: PreTrainedModel, step: SlotStep) -> torch.Tensor:
    """One forward pass: logits [slots that take part, vocabulary] of their newest tokens."""
    logits: torch.Tensor = model(
        input_ids=step.input_ids,
        position_ids=step.positions,
        use_cache=False,
        logits_to_keep=step.num_newest,
        slot_step=step,
    ).logits[0]
    return logits


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
    if step.pieces and has_kernel(query):
        outputs = [_pack_attention(step, query, keys, values, scaling)]
    else:
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


def _pack_attention(
    step: SlotStep, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attention of all pieces: [tokens of the pieces, heads, head size].

    One call and two copies out of the cache a layer. A call for each piece is what reading many prompts would wait for:
    about 400 ms for 256 of them in 10 layers on an H200.
    """
    pack = step.pack
    key, value = (
        cached[pack.key_slots, :, pack.key_positions].transpose(0, 1)[None] for cached in (keys, values)
    )
    of_pieces = query[:, :, : step.pieces[-1].stop]
    return varlen(
        of_pieces, key, value, scaling, pack.bounds, pack.longest, pack.key_bounds, pack.longest_key
    )[0]


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
        visible = torch.ones(rows.shape[2], piece.end, dtype=torch.bool, device=rows.device)
        attended = scaled_dot_product_attention(
            rows,
            keys[piece.slot, None, :, : piece.end],
            values[piece.slot, None, :, : piece.end],
            attn_mask=visible.tril_(piece.past),
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
