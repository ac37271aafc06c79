"""Causal attention over packs: every example of a pack attends to itself alone.

Registered with transformers as the attention "packed". Inside `use_pack` its mask function returns a `PackMask`, which
every family passes to its layers as `attention_mask`, so that the boundaries of the examples reach the attention even
where layers drop the caller's keyword arguments. Any other use of the mask raises an error, and
training/layout_check.py compares the result with the model's own forward pass.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.models import default_attention
from trainer.models.default_attention import LayerMask, MaskPattern, UnsupportedAttention

NAME = "packed"


@dataclass(frozen=True)
class PackedSequence:
    """Examples of a flat row: `lengths` in tokens; `cu_seqlens` int32 [examples + 1], their cumulated lengths."""

    lengths: Sequence[int]
    cu_seqlens: torch.Tensor
    use_sdpa: bool  # else the family's eager attention

    @functools.cached_property
    def max_seqlen(self) -> int:
        return max(self.lengths)


class PackMask(LayerMask):
    """Mask of a pack: that of every example is the upper left corner of the longest example's."""

    def __init__(self, pack: PackedSequence, pattern: MaskPattern) -> None:
        self.pack = pack
        self.max_seqlen = pack.max_seqlen
        self.is_causal = pattern.is_causal(pack.max_seqlen)
        self._pattern = pattern

    def of_example(self, length: int) -> torch.Tensor | None:
        """Return the boolean mask [length, length] of an example, None for plain causal attention."""
        if self.is_causal or self._pattern.is_causal(length):
            return None
        return self._longest[:length, :length]

    @functools.cached_property
    def _longest(self) -> torch.Tensor:
        positions = torch.arange(self.max_seqlen, device=self.pack.cu_seqlens.device)
        return self._pattern.visible(positions[:, None], positions)


def causal_mask(lengths: Sequence[int], cu_seqlens: torch.Tensor) -> PackMask:
    """Return the mask of a pack (see `PackedSequence`) in plain causal attention, to call `attend` without a model."""
    from transformers.masking_utils import causal_mask_function

    pattern = MaskPattern(causal_mask_function, math.inf)  # type: ignore[arg-type]
    return PackMask(PackedSequence(lengths, cu_seqlens, use_sdpa=True), pattern)


_current: PackedSequence | None = None


@contextlib.contextmanager
def use_pack(model: Any, lengths: Sequence[int], cu_seqlens: torch.Tensor) -> Iterator[None]:
    """Context manager for the forward pass of a pack by `model` (or its engine), whose attention is "packed".

    The backward pass, which may recompute layers, does not need it.
    """
    global _current
    before = _current
    _current = PackedSequence(lengths, cu_seqlens, default_attention.uses_sdpa(model))
    try:
        yield
    finally:
        _current = before


def register() -> str:
    """Register the attention with transformers and return its name for `attn_implementation`."""
    default_attention.register(NAME, attend, _make_mask)
    return NAME


def _make_mask(pattern: MaskPattern) -> PackMask:
    if _current is None:
        raise UnsupportedAttention("packed attention was called outside use_pack")
    return PackMask(_current, pattern)


def attend(
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
    """Return the attention output [1, tokens, heads, value head_dim] of a pack; transformers' attention function.

    query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens, ...], key_bias [heads, at least max_seqlen]
    (see default_attention.attend). Raises UnsupportedAttention if `attention_mask` is not a `PackMask`.
    """
    if not isinstance(attention_mask, PackMask) or query.shape[0] != 1:
        raise UnsupportedAttention("its layers do not pass the attention mask on")
    mask, pack = attention_mask, attention_mask.pack
    default_attention.check_keywords(kwargs)
    plain = pack.use_sdpa and mask.is_causal and key_bias is None and dropout == 0.0
    if plain and has_kernel(query, value):
        lengths = pack.cu_seqlens, pack.max_seqlen, pack.cu_seqlens, pack.max_seqlen
        return varlen_attention(query, key, value, scaling, *lengths), None
    # One call per example: the cost is the sum of squared lengths, not the square of the pack's.
    split = [tensor.split(list(pack.lengths), 2) for tensor in (query, key, value)]
    outputs = [
        default_attention.attend(
            module, q, k, v, mask.of_example(length), scaling, dropout, pack.use_sdpa, kwargs, key_bias
        )
        for q, k, v, length in zip(*split, pack.lengths, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def has_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether `varlen_attention` supports the tensors: Ampere or newer, 16 bits, one head_dim, <= 256, multiple of 8."""
    head_dim = query.shape[3]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and value.shape[3] == head_dim
        and torch.cuda.get_device_capability(query.device)[0] >= 8
    )


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_k: int,
) -> torch.Tensor:
    """Return the causal attention of all examples from one kernel (torch's flash attention), without dropout.

    Shapes as in `attend`. `cu_seqlens` of the queries and `cu_seqlens_k` of the keys are int32; if an example has more
    keys than queries, its last query is aligned with its last key.
    """
    from torch.nn.attention.varlen import varlen_attn

    # squeeze, not [0]: the gradient of an index is a copy into zeros, in an axis order that is copied once more.
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    is_grouped = query.shape[1] != key.shape[1]
    grouped: dict[str, Any] = {"enable_gqa": True} if is_grouped and _takes_enable_gqa() else {}
    lengths = cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k
    out = varlen_attn(q, k, v, *lengths, scale=scaling, window_size=(-1, 0), **grouped)
    assert isinstance(out, torch.Tensor)  # without return_aux
    return out.unsqueeze(0)


@functools.cache
def _takes_enable_gqa() -> bool:
    """Return whether `varlen_attn` takes `enable_gqa` (torch >= 2.12); torch 2.11 supports grouped-query attention without it."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
