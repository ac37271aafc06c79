"""Attention over KV-cache slots (kv_cache.py), for any transformers model whose attention can be replaced.

This attention is registered with transformers as "slots". transformers passes a `SlotMask` to all layers, as
`attention_mask`. The mask holds the inputs of the forward pass, because some layers drop other keyword arguments. Slots
do not work for models with recurrent or convolutional layers; evaluation/backend_check.py detects such models.
"""

import functools
from contextlib import AbstractContextManager
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
    """Mask of a forward pass over slots, shared by all layers with the same mask pattern."""

    def __init__(self, batch: ForwardBatch, pattern: MaskPattern, use_sdpa: bool) -> None:
        self.batch = batch
        self.use_sdpa = use_sdpa
        self.max_seqlen = batch.max_seqlen
        self.is_causal = pattern.is_causal(batch.max_seqlen)
        self._pattern = pattern

    @functools.cached_property
    def decode(self) -> torch.Tensor:
        """Mask [block, 1, 1, max_seqlen] for each slot's last token: 0 and -inf if causal, boolean otherwise."""
        return self.batch.mask if self.is_causal else self.decode_visible

    @functools.cached_property
    def decode_visible(self) -> torch.Tensor:
        """Boolean mask [block, 1, 1, max_seqlen] for the last token of each slot."""
        keys = torch.arange(self.batch.max_seqlen, device=self.batch.slots.device)
        return self._pattern.visible(self.batch.last_positions[:, None, None, None], keys)

    def of_chunk(self, chunk: PrefillChunk) -> torch.Tensor | None:
        """Return the boolean mask [tokens of the chunk, tokens of the sequence]; None if causal and no token is cached."""
        if chunk.num_cached == 0 and self._pattern.is_causal(chunk.end):
            return None
        positions = torch.arange(chunk.end, device=self.batch.slots.device)
        return self._pattern.visible(positions[chunk.num_cached :, None], positions)


# Batch of the current forward pass, and whether the model uses sdpa. None between forward passes.
_current: tuple[ForwardBatch, bool] | None = None


def last_token_logits(model: PreTrainedModel, batch: ForwardBatch) -> torch.Tensor:
    """Run one forward pass; return the logits [active slots, vocabulary] of the last token of each active slot."""
    global _current
    num_tokens = batch.input_ids.shape[1]
    # `logits_to_keep` must be a tensor. With an int, Gemma 4's KV-sharing layers would process only the last tokens.
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
    alibi_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return (attention output [1, tokens, heads, value head_dim], None); an attention function for transformers.

    The shapes of the arguments are those of packed_attention.attend. Raises UnsupportedAttention if `attention_mask` is
    not a `SlotMask`, if the batch size is not 1, or if `kwargs` request an attention that slots do not support.
    """
    if not isinstance(attention_mask, SlotMask) or query.shape[0] != 1:
        raise UnsupportedAttention("its layers do not pass the attention mask on")
    mask, batch = attention_mask, attention_mask.batch
    default_attention.check_keywords(kwargs)
    keys, values = batch.store(key, value)

    options = scaling, 0.0, mask.use_sdpa, kwargs, alibi_bias
    is_plain = mask.use_sdpa and mask.is_causal and alibi_bias is None
    outputs = []
    if batch.chunks and is_plain and has_kernel(query, value):
        outputs.append(_varlen_attention(batch, query, keys, values, scaling))
    else:
        for chunk in batch.chunks:
            new = slice(chunk.start, chunk.stop)
            k, v = key[:, :, new], value[:, :, new]
            if chunk.num_cached:
                k, v = keys[chunk.slot, None, :, : chunk.end], values[chunk.slot, None, :, : chunk.end]
            visible = mask.of_chunk(chunk)
            outputs.append(default_attention.attend(module, query[:, :, new], k, v, visible, *options)[0])
    last = query[0, :, query.shape[2] - batch.num_decode :].transpose(0, 1)
    if batch.active_slots is not None:
        last = last.new_zeros(batch.block, *last.shape[1:]).index_copy_(0, batch.active_slots, last)
    k, v = (tensor[: batch.block, :, : batch.max_seqlen] for tensor in (keys, values))
    if alibi_bias is not None or mask.use_sdpa:
        decode_mask, num_groups = mask.decode, keys.shape[1]
        if alibi_bias is not None:
            decode_mask = _biased(decode_mask, alibi_bias, num_groups)
        # Query heads that share a key-value head are rows of one matrix, so keys and values need not be repeated.
        grouped = last.unflatten(1, (num_groups, -1))
        attended = scaled_dot_product_attention(grouped, k, v, attn_mask=decode_mask, scale=scaling)
        attended = attended.flatten(1, 2)
    else:
        visible = mask.decode_visible
        attended = default_attention.attend(module, last.unsqueeze(2), k, v, visible, *options).squeeze(1)
    outputs.append(attended if batch.active_slots is None else attended[batch.active_slots])
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined[None], None


def _biased(mask: torch.Tensor, alibi_bias: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return the ALiBi bias [block, groups, heads per group, max_seqlen], with -inf at the keys that `mask` hides."""
    bias = alibi_bias[:, : mask.shape[3]].unflatten(0, (num_groups, -1))
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, float("-inf"))
    return mask + bias.to(mask.dtype)


def _varlen_attention(
    batch: ForwardBatch, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Return the attention output [tokens of all chunks, heads, head_dim] of the chunks.

    Each layer makes one kernel call, for which it copies the keys and values out of the cache. With one call per prompt, 256
    prompts and 10 layers would take about 400 ms on an H200.
    """
    varlen = batch.varlen_batch
    key, value = (
        cached[varlen.key_slots, :, varlen.key_positions].transpose(0, 1)[None] for cached in (keys, values)
    )
    query = query[:, :, : batch.chunks[-1].stop]
    lengths = varlen.cu_seqlens, varlen.max_seqlen, varlen.cu_seqlens_k, varlen.max_seqlen_k
    return varlen_attention(query, key, value, scaling, *lengths)[0]


def use_slot_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Return a context manager that sets slot attention and evaluation mode, and restores both on exit.

    Raises UnsupportedAttention on entry if the attention of the model's layers cannot be replaced.
    """
    return default_attention.evaluation_mode(model, NAME)


default_attention.register(NAME, slot_attention, _make_mask)
