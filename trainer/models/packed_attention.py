"""Causal attention over packs: every example of a pack attends to itself alone.

Registered with transformers as the attention "packed". Inside `use_pack` its mask function returns a `PackMask`, an
object that every family hands down to its layers as `attention_mask`, so that the boundaries of the examples reach the
attention also where layers drop the caller's keyword arguments. A family that does anything else with its mask fails
there, and training/layout_check.py compares what comes out with the model's own forward pass.
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
    """The examples of a flat row: `lengths` in tokens; `bounds` int32 [examples + 1], where they start, and the total."""

    lengths: Sequence[int]
    cu_seqlens: torch.Tensor
    sdpa: bool  # else the family's eager attention

    @functools.cached_property
    def max_seqlen(self) -> int:
        return max(self.lengths)


class PackMask(LayerMask):
    """The mask of a pack: every example has the upper left corner of its longest one's."""

    def __init__(self, pack: PackedSequence, pattern: MaskPattern) -> None:
        self.pack = pack
        self.is_causal = pattern.is_causal(pack.max_seqlen)
        self._pattern = pattern
        self._square: torch.Tensor | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return self.pack.max_seqlen

    def of_example(self, length: int) -> torch.Tensor | None:
        """Return the boolean mask [length, length] of an example, None for plain causal attention."""
        if self.is_causal or self._pattern.is_causal(length):
            return None
        if self._square is None:
            self._square = self._pattern.square(self.pack.max_seqlen, self.pack.cu_seqlens.device)
        return self._square[:length, :length]


def causal_mask(lengths: Sequence[int], bounds: torch.Tensor) -> PackMask:
    """Return the mask of a pack (see `Pack`) in plain causal attention, to call `attend` without a model."""
    from transformers.masking_utils import causal_mask_function

    return PackMask(PackedSequence(lengths, bounds, sdpa=True), MaskPattern(causal_mask_function, math.inf))  # type: ignore[arg-type]


_current: PackedSequence | None = None


@contextlib.contextmanager
def use_pack(model: Any, lengths: Sequence[int], bounds: torch.Tensor) -> Iterator[None]:
    """Context manager for the forward pass of a pack by `model` (or its engine), whose attention is "packed".

    The backward pass, which may recompute layers, does not need it.
    """
    global _current
    before = _current
    _current = PackedSequence(lengths, bounds, default_attention.uses_sdpa(model))
    try:
        yield
    finally:
        _current = before


def register() -> str:
    """Make the attention known to transformers; returns the name for `attn_implementation`."""
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
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens, ...] -> [1, tokens, heads, value head_dim].

    key_bias [heads, at least the longest example]: see default_attention.attend. Raises UnsupportedAttention if the layer
    does not hand down the mask.
    """
    if not isinstance(attention_mask, PackMask) or query.shape[0] != 1:
        raise UnsupportedAttention("its layers do not hand the attention mask on")
    mask, pack = attention_mask, attention_mask.pack
    default_attention.check_keywords(others)
    plain = pack.sdpa and mask.is_causal and key_bias is None and dropout == 0.0
    if plain and has_kernel(query, value):
        return varlen_attention(query, key, value, scaling, pack.cu_seqlens, pack.max_seqlen), None
    # One call per example: work grows with the sum of squared lengths, not with the square of the pack's.
    lengths = list(pack.lengths)
    cut = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), lengths, strict=True)
    outputs = [
        default_attention.attend(
            module, q, k, v, mask.of_example(length), scaling, dropout, pack.sdpa, others, key_bias
        )
        for q, k, v, length in cut
    ]
    return torch.cat(outputs, dim=1), None


def has_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Flash attention in torch: Ampere or newer, 16 bits, heads of one size up to 256 in multiples of 8."""
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
    bounds: torch.Tensor,
    longest: int,
    key_bounds: torch.Tensor | None = None,
    longest_key: int | None = None,
) -> torch.Tensor:
    """One kernel for all examples (flash attention inside torch, no extra package); it has no dropout.

    An example that has more keys (`key_bounds`, int32 like `bounds`) than queries: its last query sees its last key.
    """
    from torch.nn.attention.varlen import varlen_attn

    # Not [0], whose gradient is a tensor of zeros to copy into, in an order of axes that has to be copied once more.
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    grouped: dict[str, Any] = {}
    if query.shape[1] != key.shape[1] and _takes_enable_gqa():
        grouped = {"enable_gqa": True}
    key_bounds = bounds if key_bounds is None else key_bounds
    longest_key = longest if longest_key is None else longest_key
    out = varlen_attn(
        q, k, v, bounds, key_bounds, longest, longest_key, scale=scaling, window_size=(-1, 0), **grouped
    )
    assert isinstance(out, torch.Tensor)  # return_aux was not asked for
    return out.unsqueeze(0)


@functools.cache
def _takes_enable_gqa() -> bool:
    """Return whether `varlen_attn` takes `enable_gqa` (torch >= 2.12); older ones accept fewer key-value heads as they are."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
