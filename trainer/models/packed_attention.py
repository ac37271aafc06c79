"""Causal attention over packs, i.e. rows of several examples. The tokens of an example attend only to this example.

This attention is registered with transformers as "packed". Inside `use_pack`, transformers passes a `PackMask` to all layers
as `attention_mask`. The mask holds the boundaries of the examples, because some layers drop other keyword arguments. A layer
that uses the mask as a tensor raises UnsupportedAttention. training/layout_check.py compares the logits of packs with those
of a plain forward pass.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.models import default_attention
from trainer.models.default_attention import LayerMask, MaskPattern, UnsupportedAttention

NAME = "packed"


@dataclass(frozen=True)
class PackedSequence:
    """Boundaries of the examples in a flat row of tokens."""

    lengths: Sequence[int]  # number of tokens of each example
    cu_seqlens: torch.Tensor  # [examples + 1] int32, cumulated lengths
    use_sdpa: bool  # True: torch's sdpa; False: the model family's eager attention

    @functools.cached_property
    def max_seqlen(self) -> int:
        return max(self.lengths)


class PackMask(LayerMask):
    """Mask of a pack. The mask of an example with n tokens is the first n rows and columns of the longest example's mask."""

    def __init__(self, pack: PackedSequence, pattern: MaskPattern) -> None:
        self.pack = pack
        self.max_seqlen = pack.max_seqlen
        self.is_causal = pattern.is_causal(pack.max_seqlen)
        self._pattern = pattern

    def of_example(self, length: int) -> torch.Tensor | None:
        """Return the boolean mask [length, length] of an example; None for plain causal attention."""
        if self.is_causal or self._pattern.is_causal(length):
            return None
        return self._longest_mask[:length, :length]

    @functools.cached_property
    def _longest_mask(self) -> torch.Tensor:
        positions = torch.arange(self.max_seqlen, device=self.pack.cu_seqlens.device)
        return self._pattern.visible(positions[:, None], positions)


_current: PackedSequence | None = None


@contextlib.contextmanager
def use_pack(model: Any, lengths: Sequence[int], cu_seqlens: torch.Tensor) -> Iterator[None]:
    """Context manager for a forward pass over a pack. `model`: a model with attention "packed", or its DeepSpeed engine.

    The backward pass may run outside this context, even if it recomputes layers.
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
    alibi_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return (attention output [1, tokens, heads, value head_dim] of a pack, None), as transformers' interface requires.

    query [1, heads, tokens, head_dim], key and value [1, key-value heads, tokens, ...], alibi_bias [heads, at least
    max_seqlen] (see default_attention.attend). Raises UnsupportedAttention if the batch size is not 1, or if the mask is not
    a `PackMask`.
    """
    if not isinstance(attention_mask, PackMask) or query.shape[0] != 1:
        raise UnsupportedAttention("its layers do not pass the attention mask on")
    mask, pack = attention_mask, attention_mask.pack
    default_attention.check_keywords(kwargs)
    is_plain = pack.use_sdpa and mask.is_causal and alibi_bias is None and dropout == 0.0
    if is_plain and has_kernel(query, value):
        lengths = pack.cu_seqlens, pack.max_seqlen
        return varlen_attention(query, key, value, scaling, *lengths, *lengths), None
    # Call once per example: the cost of one call for the whole pack would grow with the square of the pack's length.
    examples = zip(*(tensor.split(list(pack.lengths), 2) for tensor in (query, key, value)), strict=True)
    masks, options = map(mask.of_example, pack.lengths), (scaling, dropout, pack.use_sdpa, kwargs, alibi_bias)
    outputs = [
        default_attention.attend(module, q, k, v, visible, *options)
        for (q, k, v), visible in zip(examples, masks, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def has_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether `varlen_attention` supports the tensors' device, dtype and head_dim."""
    head_dim = query.shape[3]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and head_dim in range(0, 257, 8)
        and value.shape[3] == head_dim
        and torch.cuda.get_device_capability(query.device)[0] >= 8  # Ampere or newer
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
    """Return the output of causal attention for all examples, computed by one kernel (torch's flash attention).

    The shapes are those of `attend`. cu_seqlens, cu_seqlens_k: int32 [examples + 1], cumulated numbers of queries and of
    keys. max_seqlen, max_seqlen_k: largest numbers of queries and of keys. If an example has more keys than queries, its
    last query is aligned with its last key. No dropout is applied.
    """
    from torch.nn.attention.varlen import varlen_attn

    # Use squeeze(0), not [0]. In the backward pass, [0] copies the gradient twice: into a tensor of zeros, and to reorder
    # the axes.
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    is_grouped = query.shape[1] != key.shape[1]
    grouped: dict[str, Any] = {"enable_gqa": True} if is_grouped and _takes_enable_gqa() else {}
    lengths = cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k
    out = varlen_attn(q, k, v, *lengths, scale=scaling, window_size=(-1, 0), **grouped)
    assert isinstance(out, torch.Tensor)  # varlen_attn returns a tuple only if return_aux is given
    return out.unsqueeze(0)


@functools.cache
def _takes_enable_gqa() -> bool:
    """Return whether `varlen_attn` takes `enable_gqa` (torch >= 2.12). torch 2.11 groups queries without this argument."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
