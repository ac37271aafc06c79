"""Forward passes for the attention layers of BLOOM, MPT and Falcon, which do not use transformers' attention interface.

They make the same projections and pass query, key and value to a given attention function, with the ALiBi bias
(Press et al., ICLR 2022) as `key_bias` [heads, positions]. The bias depends on the key's position alone, since softmax
ignores a constant added to all keys of a query.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import dropout

from trainer.runtime import library_internals

_Attention = Callable[..., tuple[torch.Tensor, None]]


def replaceable_layers(model: torch.nn.Module) -> list[Any]:
    """Return the attention layers of `model` that have a forward pass here."""
    return [module for module in model.modules() if type(module).__name__ in _FORWARDS]


def has_replacements(model_class: type) -> bool:
    """Return whether models of this class have layers with a forward pass here."""
    return any(hasattr(_module_of(model_class), name) for name in _FORWARDS)


def use_attention(model: torch.nn.Module, attention: _Attention | None) -> None:
    """Make the layers call `attention`, an attention function of transformers' signature; None restores their own forward."""
    for layer in replaceable_layers(model):
        vars(layer).pop("forward", None)
        if attention is not None:
            layer.forward = functools.partial(_FORWARDS[type(layer).__name__], layer, attention)


def _bloom(
    layer: Any,
    attention: _Attention,
    hidden: torch.Tensor,
    residual: torch.Tensor,
    attention_mask: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    query, key, value = library_internals.split_bloom_heads(layer, layer.query_key_value(hidden))
    context, _weights = attention(
        layer,
        *(query, key, value, attention_mask),
        scaling=layer.inv_norm_factor,
        dropout=layer.attention_dropout.p if layer.training else 0.0,
        key_bias=layer.beta * _own_bias(layer, attention_mask.max_seqlen, hidden),
    )
    output = dropout(layer.dense(context.flatten(2)), p=layer.hidden_dropout, training=layer.training)
    return residual + output, None


def _falcon(
    layer: Any,
    attention: _Attention,
    hidden: torch.Tensor,
    alibi: torch.Tensor | None,
    attention_mask: Any,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    query, key, value = (
        heads.transpose(1, 2)
        for heads in library_internals.split_falcon_heads(layer, layer.query_key_value(hidden))
    )
    bias, probability = None, 0.0
    if alibi is None:
        assert position_embeddings is not None
        query, key = _module_of(layer).apply_rotary_pos_emb(query, key, *position_embeddings)
    else:
        bias = layer.inv_norm_factor * _own_bias(layer, attention_mask.max_seqlen, hidden)
        probability = layer.attention_dropout.p if layer.training else 0.0
    context, _weights = attention(
        layer,
        *(query, key, value, attention_mask),
        scaling=layer.inv_norm_factor,
        dropout=probability,
        key_bias=bias,
    )
    return layer.dense(context.flatten(2)), None


def _mpt(
    layer: Any,
    attention: _Attention,
    hidden: torch.Tensor,
    position_bias: torch.Tensor,
    attention_mask: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    mixed = layer.Wqkv(hidden)
    if layer.clip_qkv:
        mixed = mixed.clamp(min=-layer.clip_qkv, max=layer.clip_qkv)
    query, key, value = (
        heads.unflatten(2, (layer.n_heads, layer.head_dim)).transpose(1, 2) for heads in mixed.chunk(3, dim=2)
    )
    slopes = position_bias[:, 0, -1] - position_bias[:, 0, -2]
    positions = torch.arange(attention_mask.max_seqlen, device=hidden.device)
    context, _weights = attention(
        layer,
        *(query, key, value, attention_mask),
        scaling=layer.softmax_scale,
        dropout=layer.attn_dropout_p if layer.training else 0.0,
        key_bias=slopes[:, None] * positions,
    )
    return layer.out_proj(context.flatten(2)), None


def _own_bias(layer: Any, max_seqlen: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return the bias [heads, max_seqlen] from the family's own function, hence with the family's rounding."""
    mask = torch.ones(1, max_seqlen, dtype=torch.int64, device=hidden.device)
    bias: torch.Tensor = _module_of(layer).build_alibi_tensor(mask, layer.num_heads, dtype=hidden.dtype)
    return bias.squeeze(1)


def _module_of(layer: Any) -> Any:
    """Return the modeling module of a layer or a class."""
    return sys.modules[(layer if isinstance(layer, type) else type(layer)).__module__]


_FORWARDS: dict[str, Callable[..., Any]] = {
    "BloomAttention": _bloom,
    "FalconAttention": _falcon,
    "MptAttention": _mpt,
}
