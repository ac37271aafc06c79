"""Forward passes for the attention layers of BLOOM, MPT and Falcon, which do not use transformers' attention interface.

A forward pass here computes the family's projections and passes query, key and value to an attention function. The ALiBi
bias (Press et al., ICLR 2022) is the argument `alibi_bias` [heads, positions of keys]. ALiBi also subtracts a term for the
query's position. This term is the same for all keys, and softmax ignores it, so it is omitted.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from trainer.runtime import library_internals

_Attention = Callable[..., tuple[Tensor, None]]


def replaceable_layers(model: torch.nn.Module) -> list[Any]:
    """Return the attention layers of `model` whose forward pass this module can replace."""
    return [module for module in model.modules() if type(module).__name__ in _FORWARDS]


def has_replacements(model_class: type) -> bool:
    """Return whether models of this class have attention layers that this module can replace."""
    return any(hasattr(_module_of(model_class), name) for name in _FORWARDS)


def use_attention(model: torch.nn.Module, attention: _Attention | None) -> None:
    """Make the replaceable layers of `model` call `attention` (transformers' interface). If `attention` is None, undo this."""
    for layer in replaceable_layers(model):
        vars(layer).pop("forward", None)
        if attention is not None:
            layer.forward = functools.partial(_FORWARDS[type(layer).__name__], layer, attention)


def _bloom(
    layer: Any, attention: _Attention, hidden: Tensor, residual: Tensor, attention_mask: Any = None, **_: Any
) -> tuple[Tensor, None]:
    query, key, value = library_internals.split_bloom_heads(layer, layer.query_key_value(hidden))
    context, _weights = attention(
        *(layer, query, key, value, attention_mask),
        scaling=layer.inv_norm_factor,
        dropout=layer.attention_dropout.p if layer.training else 0.0,
        alibi_bias=layer.beta * _own_bias(layer, attention_mask.max_seqlen, hidden),
    )
    output = dropout(layer.dense(context.flatten(2)), p=layer.hidden_dropout, training=layer.training)
    return residual + output, None


def _falcon(
    layer: Any,
    attention: _Attention,
    hidden: Tensor,
    alibi: Tensor | None,
    attention_mask: Any,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    fused = layer.query_key_value(hidden)
    query, key, value = (x.transpose(1, 2) for x in library_internals.split_falcon_heads(layer, fused))
    options: dict[str, Any] = {"scaling": layer.inv_norm_factor}
    if alibi is None:
        assert position_embeddings is not None
        query, key = _module_of(layer).apply_rotary_pos_emb(query, key, *position_embeddings)
    else:
        options["alibi_bias"] = layer.inv_norm_factor * _own_bias(layer, attention_mask.max_seqlen, hidden)
        options["dropout"] = layer.attention_dropout.p if layer.training else 0.0
    context, _weights = attention(layer, query, key, value, attention_mask, **options)
    return layer.dense(context.flatten(2)), None


def _mpt(
    layer: Any, attention: _Attention, hidden: Tensor, position_bias: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    fused = layer.Wqkv(hidden)
    if layer.clip_qkv:
        fused = fused.clamp(min=-layer.clip_qkv, max=layer.clip_qkv)
    query, key, value = (
        x.unflatten(2, (layer.n_heads, layer.head_dim)).transpose(1, 2) for x in fused.chunk(3, dim=2)
    )
    slopes = position_bias[:, 0, -1] - position_bias[:, 0, -2]
    positions = torch.arange(attention_mask.max_seqlen, device=hidden.device)
    context, _weights = attention(
        *(layer, query, key, value, attention_mask),
        scaling=layer.softmax_scale,
        dropout=layer.attn_dropout_p if layer.training else 0.0,
        alibi_bias=slopes[:, None] * positions,
    )
    return layer.out_proj(context.flatten(2)), None


def _own_bias(layer: Any, max_seqlen: int, hidden: Tensor) -> Tensor:
    """Return the ALiBi bias [heads, max_seqlen]. transformers' function computes it, so it is rounded as in transformers."""
    mask = torch.ones(1, max_seqlen, dtype=torch.int64, device=hidden.device)
    bias: Tensor = _module_of(layer).build_alibi_tensor(mask, layer.num_heads, dtype=hidden.dtype)
    return bias.squeeze(1)


def _module_of(layer: Any) -> Any:
    """Return the modeling module that defines `layer` (a class) or the class of `layer` (an instance)."""
    return sys.modules[(layer if isinstance(layer, type) else type(layer)).__module__]


_FORWARDS: dict[str, Callable[..., Any]] = {
    "BloomAttention": _bloom,
    "FalconAttention": _falcon,
    "MptAttention": _mpt,
}
