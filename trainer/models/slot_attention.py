"""Attention over generation slots (slots.py), for any model of transformers whose attention can be replaced.

Registered with transformers as the attention "slots". Its mask function returns a `SlotMask`, which every family hands
down to its layers as `attention_mask`, so the slots reach the attention also where layers drop the caller's keyword
arguments. Recurrent and convolutional layers do not call attention: evaluation/backend_check.py compares what comes
out with the model's own forward pass.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from trainer.models import default_attention
from trainer.models.default_attention import LayerMask, MaskPattern, UnsupportedAttention
from trainer.models.kv_cache import ForwardBatch, PrefillChunk
from trainer.models.packed_attention import has_kernel, varlen_attention

IMPLEMENTATION = "slots"


class SlotMask(LayerMask):
    """The mask of a forward pass over slots, for all layers of one pattern."""

    def __init__(self, step: ForwardBatch, pattern: MaskPattern, sdpa: bool) -> None:
        self.step = step
        self.sdpa = sdpa
        self.is_causal = pattern.is_causal(step.longest)
        self._pattern = pattern

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, rounded up."""
        return self.step.longest

    @functools.cached_property
    def decode(self) -> torch.Tensor:
        """Mask [block, 1, 1, longest] of the newest tokens: 0 or -inf for a causal pattern, else boolean."""
        if self.is_causal:
            return self.step.mask
        return self.decode_visible

    @functools.cached_property
    def decode_visible(self) -> torch.Tensor:
        """The same, always boolean."""
        keys = torch.arange(self.step.longest, device=self.step.slots.device)
        return self._pattern.visible(self.step.last_positions[:, None, None, None], keys)

    def of_chunk(self, piece: PrefillChunk) -> torch.Tensor | None:
        """Boolean mask [tokens of the piece, tokens of the sequence]; None for a causal one of a sequence's start."""
        if piece.num_cached == 0 and self._pattern.is_causal(piece.end):
            return None
        positions = torch.arange(piece.end, device=self.step.slots.device)
        return self._pattern.visible(positions[piece.num_cached :, None], positions)


_current: tuple[ForwardBatch, bool] | None = None  # of the forward pass under way, and whether it uses sdpa


def last_token_logits(model: PreTrainedModel, step: ForwardBatch) -> torch.Tensor:
    """One forward pass: logits [slots that take part, vocabulary] of their newest tokens."""
    global _current
    num_tokens = step.input_ids.shape[1]
    # As a tensor: with a number Gemma 4's layers that share keys and values read the last tokens only.
    newest = torch.arange(num_tokens - step.num_decode, num_tokens, device=step.input_ids.device)
    _current = step, default_attention.uses_sdpa(model)
    try:
        logits: torch.Tensor = model(
            input_ids=step.input_ids,
            position_ids=step.positions,
            attention_mask=torch.ones_like(step.input_ids),
            use_cache=False,
            logits_to_keep=newest,
        ).logits[0]
    finally:
        _current = None
    return logits[-step.num_decode :]


def _make_mask(pattern: MaskPattern) -> SlotMask:
    if _current is None:
        raise UnsupportedAttention("attention over slots was called outside newest_logits")
    return SlotMask(_current[0], pattern, _current[1])


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    key_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each token over its own slot. query [1, heads, tokens, head size] -> [1, tokens, heads, value head size].

    Raises UnsupportedAttention if the layer does not hand down the mask.
    """
    if not isinstance(attention_mask, SlotMask) or query.shape[0] != 1:
        raise UnsupportedAttention("its layers do not hand the attention mask on")
    mask, step = attention_mask, attention_mask.step
    default_attention.check_keywords(others)
    keys, values = step.store(key, value)

    num_tokens = query.shape[2]
    plain = mask.sdpa and mask.is_causal and key_bias is None
    if step.chunks and plain and has_kernel(query, value):
        outputs = [_varlen_attention(step, query, keys, values, scaling)]
    else:
        outputs = [
            _chunk_attention(module, piece, mask, query, key, value, keys, values, scaling, others, key_bias)
            for piece in step.chunks
        ]
    newest = query[0, :, num_tokens - step.num_decode :].transpose(0, 1)
    if step.rows is not None:
        newest = newest.new_zeros(step.block, *newest.shape[1:]).index_copy_(0, step.rows, newest)
    cached = keys[: step.block, :, : step.longest], values[: step.block, :, : step.longest]
    if key_bias is not None:
        attended = _decode_attention(newest, *cached, _biased(mask.decode, key_bias, keys.shape[1]), scaling)
    elif mask.sdpa:
        attended = _decode_attention(newest, *cached, mask.decode, scaling)
    else:
        attended = default_attention.attend(
            module, newest.unsqueeze(2), *cached, mask.decode_visible, scaling, 0.0, False, others
        ).squeeze(1)
    outputs.append(attended if step.rows is None else attended[step.rows])
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined[None], None


def _decode_attention(
    newest: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of one token a slot: newest [block, heads, head size] -> [block, heads, value head size].

    Grouped queries become rows of one query matrix: no repetition of keys and values, and one mask for all heads.
    """
    block, num_heads, head_size = newest.shape
    num_groups = keys.shape[1]
    return scaled_dot_product_attention(
        newest.reshape(block, num_groups, num_heads // num_groups, head_size),
        keys,
        values,
        attn_mask=mask,
        scale=scaling,
    ).reshape(block, num_heads, values.shape[3])


def _biased(mask: torch.Tensor, key_bias: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Add key_bias [heads, positions] to mask [block, 1, 1, longest] -> [block, key-value heads, heads of each, longest]."""
    bias = key_bias[:, : mask.shape[3]].unflatten(0, (num_groups, -1))
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, float("-inf"))
    return mask + bias.to(mask.dtype)


def _varlen_attention(
    step: ForwardBatch, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attention of all pieces: [tokens of the pieces, heads, head size].

    One call and two copies out of the cache a layer. A call for each piece is what reading many prompts would wait for:
    about 400 ms for 256 of them in 10 layers on an H200.
    """
    pack = step.varlen_batch
    key, value = (
        cached[pack.key_slots, :, pack.key_positions].transpose(0, 1)[None] for cached in (keys, values)
    )
    of_pieces = query[:, :, : step.chunks[-1].stop]
    return varlen_attention(
        of_pieces, key, value, scaling, pack.cu_seqlens, pack.max_seqlen, pack.cu_seqlens_k, pack.max_seqlen_k
    )[0]


def _chunk_attention(
    module: torch.nn.Module,
    piece: PrefillChunk,
    mask: SlotMask,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    others: dict[str, Any],
    key_bias: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of several new tokens of one slot: [tokens of the piece, heads, value head size]."""
    new = slice(piece.start, piece.stop)
    if piece.num_cached == 0:
        seen = key[:, :, new], value[:, :, new]
    else:
        seen = keys[piece.slot, None, :, : piece.end], values[piece.slot, None, :, : piece.end]
    visible = mask.of_chunk(piece)
    return default_attention.attend(
        module, query[:, :, new], *seen, visible, scaling, 0.0, mask.sdpa, others, key_bias
    )[0]


@contextlib.contextmanager
def use_slot_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch `model` to attention over slots and to evaluation mode; on exit both are as they were.

    Raises UnsupportedAttention if its layers do not let their attention be replaced.
    """
    before = default_attention.attention_of_submodules(model)
    training = model.training
    default_attention.set_attention(model, IMPLEMENTATION)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        default_attention.restore_attention(model, before)


default_attention.register(IMPLEMENTATION, slot_attention, _make_mask)
