"""Attention over generation slots (kv_cache.py), for any transformers model whose attention can be replaced.

Registered with transformers as the attention "slots". Its mask function returns a `SlotMask`, which every family passes
to its layers as `attention_mask`, so that the slots reach the attention even where layers drop the caller's keyword
arguments. Recurrent and convolutional layers do not call attention: evaluation/backend_check.py compares the result
with the model's own forward pass.
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

NAME = "slots"


class SlotMask(LayerMask):
    """Mask of a forward pass over slots, shared by all layers of one pattern."""

    def __init__(self, batch: ForwardBatch, pattern: MaskPattern, use_sdpa: bool) -> None:
        self.batch = batch
        self.use_sdpa = use_sdpa
        self.max_seqlen = batch.max_seqlen
        self.is_causal = pattern.is_causal(batch.max_seqlen)
        self._pattern = pattern

    @functools.cached_property
    def decode(self) -> torch.Tensor:
        """Return the mask [block, 1, 1, max_seqlen] of the last tokens: 0 or -inf for a causal pattern, else boolean."""
        return self.batch.mask if self.is_causal else self.decode_visible

    @functools.cached_property
    def decode_visible(self) -> torch.Tensor:
        """Return the boolean mask [block, 1, 1, max_seqlen] of the last tokens."""
        keys = torch.arange(self.batch.max_seqlen, device=self.batch.slots.device)
        return self._pattern.visible(self.batch.last_positions[:, None, None, None], keys)

    def of_chunk(self, chunk: PrefillChunk) -> torch.Tensor | None:
        """Return the boolean mask [tokens of the chunk, tokens of the sequence]; None for a causal first chunk."""
        if chunk.num_cached == 0 and self._pattern.is_causal(chunk.end):
            return None
        positions = torch.arange(chunk.end, device=self.batch.slots.device)
        return self._pattern.visible(positions[chunk.num_cached :, None], positions)


# During a forward pass: its batch, and whether it uses sdpa.
_current: tuple[ForwardBatch, bool] | None = None


def last_token_logits(model: PreTrainedModel, batch: ForwardBatch) -> torch.Tensor:
    """Run one forward pass and return the logits [active slots, vocabulary] of their last tokens."""
    global _current
    num_tokens = batch.input_ids.shape[1]
    # A tensor: given a number, Gemma 4's layers that share keys and values would process the last tokens only.
    last = torch.arange(num_tokens - batch.num_decode, num_tokens, device=batch.input_ids.device)
    _current = batch, default_attention.uses_sdpa(model)
    try:
        logits: torch.Tensor = model(
            input_ids=batch.input_ids,
            position_ids=batch.positions,
            attention_mask=torch.ones_like(batch.input_ids),
            use_cache=False,
            logits_to_keep=last,
        ).logits[0]
    finally:
        _current = None
    return logits[-batch.num_decode :]


def _make_mask(pattern: MaskPattern) -> SlotMask:
    if _current is None:
        raise UnsupportedAttention("attention over slots was called outside last_token_logits")
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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of each token over its own slot [1, tokens, heads, value head_dim]; transformers' attention function.

    query [1, heads, tokens, head_dim]. Raises UnsupportedAttention if `attention_mask` is not a `SlotMask`.
    """
    if not isinstance(attention_mask, SlotMask) or query.shape[0] != 1:
        raise UnsupportedAttention("its layers do not pass the attention mask on")
    mask, batch = attention_mask, attention_mask.batch
    default_attention.check_keywords(kwargs)
    keys, values = batch.store(key, value)

    num_tokens = query.shape[2]
    plain = mask.use_sdpa and mask.is_causal and key_bias is None
    if batch.chunks and plain and has_kernel(query, value):
        outputs = [_varlen_attention(batch, query, keys, values, scaling)]
    else:
        outputs = []
        for chunk in batch.chunks:
            new = slice(chunk.start, chunk.stop)
            if chunk.num_cached == 0:
                seen = key[:, :, new], value[:, :, new]
            else:
                seen = keys[chunk.slot, None, :, : chunk.end], values[chunk.slot, None, :, : chunk.end]
            attended = default_attention.attend(
                module,
                query[:, :, new],
                *seen,
                mask.of_chunk(chunk),
                scaling,
                0.0,
                mask.use_sdpa,
                kwargs,
                key_bias,
            )
            outputs.append(attended[0])
    last = query[0, :, num_tokens - batch.num_decode :].transpose(0, 1)
    if batch.active_slots is not None:
        last = last.new_zeros(batch.block, *last.shape[1:]).index_copy_(0, batch.active_slots, last)
    cached = keys[: batch.block, :, : batch.max_seqlen], values[: batch.block, :, : batch.max_seqlen]
    if key_bias is not None or mask.use_sdpa:
        decode_mask = mask.decode
        if key_bias is not None:
            decode_mask = _biased(decode_mask, key_bias, keys.shape[1])
        # Grouped queries are rows of one query matrix: no repetition of keys and values, and one mask for all heads.
        grouped = last.unflatten(1, (keys.shape[1], -1))
        attended = scaled_dot_product_attention(grouped, *cached, attn_mask=decode_mask, scale=scaling)
        attended = attended.flatten(1, 2)
    else:
        attended = default_attention.attend(
            module, last.unsqueeze(2), *cached, mask.decode_visible, scaling, 0.0, False, kwargs
        ).squeeze(1)
    outputs.append(attended if batch.active_slots is None else attended[batch.active_slots])
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined[None], None


def _biased(mask: torch.Tensor, key_bias: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return key_bias [heads, positions] + mask [block, 1, 1, max_seqlen]: [block, groups, heads of a group, max_seqlen]."""
    bias = key_bias[:, : mask.shape[3]].unflatten(0, (num_groups, -1))
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, float("-inf"))
    return mask + bias.to(mask.dtype)


def _varlen_attention(
    batch: ForwardBatch, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Return the attention of all chunks [tokens of the chunks, heads, head_dim].

    One call and two copies out of the cache per layer. One call per chunk would dominate the prefill of many prompts:
    about 400 ms for 256 of them in 10 layers on an H200.
    """
    varlen = batch.varlen_batch
    key, value = (
        cached[varlen.key_slots, :, varlen.key_positions].transpose(0, 1)[None] for cached in (keys, values)
    )
    query = query[:, :, : batch.chunks[-1].stop]
    lengths = varlen.cu_seqlens, varlen.max_seqlen, varlen.cu_seqlens_k, varlen.max_seqlen_k
    return varlen_attention(query, key, value, scaling, *lengths)[0]


@contextlib.contextmanager
def use_slot_attention(model: PreTrainedModel) -> Iterator[None]:
    """Context manager with `model` in slot attention and evaluation mode; both are restored on exit.

    Raises UnsupportedAttention if the attention of its layers cannot be replaced.
    """
    before = default_attention.attention_of_submodules(model)
    training = model.training
    default_attention.set_attention(model, NAME)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        default_attention.restore_attention(model, before)


default_attention.register(NAME, slot_attention, _make_mask)
