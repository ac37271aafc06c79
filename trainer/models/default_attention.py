"""Attention of one sequence, as transformers' default implementation of a model family computes it.

Packed attention and slot attention split a flat row of tokens into sequences and call `attend` for each. Mask and
arithmetic come from transformers:

- Transformers calls a registered mask function with the family's rule of the keys that a query sees (causal, sliding
  window, chunk). `MaskPattern` keeps that rule and evaluates it for the positions of one sequence.
- Families that support sdpa get torch's kernel, as in transformers. All others (soft caps, attention sinks) get the
  `eager_attention_forward` of their own modeling file.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from trainer.models import alibi
from trainer.runtime import library_internals

_MaskFunction = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]  # batch, head, query, key

_registered: dict[str, Callable[..., Any]] = {}


class UnsupportedAttention(RuntimeError):
    """Raised for a model whose attention cannot be computed sequence by sequence; the message is the reason."""


class MaskPattern:
    """Rule of the keys that a query sees, as a function of both positions within one sequence.

    `function`: transformers' mask function. `max_causal_length`: sequences up to this length are plainly causal.
    """

    def __init__(self, function: _MaskFunction, max_causal_length: float) -> None:
        self._function = function
        self._max_causal_length = max_causal_length

    def is_causal(self, length: int) -> bool:
        """Return whether the pattern is plain causal attention for sequences of up to `length` tokens."""
        return length <= self._max_causal_length

    def visible(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return a boolean mask of the broadcast shape of the positions `queries` and `keys` (int64)."""
        first = torch.zeros((), dtype=torch.int64, device=queries.device)
        return self._function(first, first, queries, keys)


def register(name: str, attention: Callable[..., Any], make_mask: Callable[[MaskPattern], LayerMask]) -> None:
    """Register an attention implementation with transformers; its layers get `make_mask(...)` as `attention_mask`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

    def mask(
        *_: Any,
        mask_function: Any = causal_mask_function,
        local_size: int | None = None,
        use_vmap: bool = False,
        config: Any = None,
        **__: Any,
    ) -> object:
        if use_vmap or not getattr(config, "is_causal", True):
            raise UnsupportedAttention("its attention mask is not a causal function of positions")
        # A window or a chunk hides nothing from sequences that fit into it.
        max_causal_length = math.inf if mask_function is causal_mask_function else local_size or 0
        return make_mask(MaskPattern(mask_function, max_causal_length))

    disable_cudnn_sdpa()
    _registered[name] = attention
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def disable_cudnn_sdpa() -> None:
    """Exclude cuDNN's kernel from `scaled_dot_product_attention` in this process.

    On Hopper and Blackwell torch (2.11 to 2.13) prefers cuDNN's kernel, which builds a plan for every new shape: 0.4 s
    on a B200 (modelscope/FunASR #3704). Packed examples and generation slots have a new shape at almost every call.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def uses_sdpa(model: Any) -> bool:
    """Return whether transformers would choose sdpa, not eager, for this model (or the engine around it)."""
    return bool(getattr(getattr(model, "module", model), "_supports_sdpa", False))


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    use_sdpa: bool,
    kwargs: dict[str, Any],
    key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention of `batch` sequences [batch, queries, heads, value head_dim].

    query [batch, heads, queries, head_dim], key and value [batch, key-value heads, keys, ...]. visible: boolean mask
    that broadcasts to [batch, heads, queries, keys]; None: causal, as many keys as queries. key_bias [heads, at least
    keys]: added to the scores of the keys (alibi.py). kwargs: the layer's other arguments, for the family's eager function.
    """
    if use_sdpa and key_bias is None:
        mask = visible
    else:
        if visible is None:
            length = query.shape[2]
            visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        mask = visible.view((1,) * (4 - visible.dim()) + visible.shape)
        if key_bias is not None:
            mask = torch.where(mask, key_bias[:, None, : key.shape[2]].to(query.dtype), float("-inf"))
    if use_sdpa or key_bias is not None:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None and query.shape[2] > 1,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        ).transpose(1, 2)
    assert mask is not None
    additive = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    additive.masked_fill_(~mask, torch.finfo(query.dtype).min)
    eager = _eager_function(type(module))  # type: ignore[arg-type]
    outputs = eager(module, query, key, value, additive, scaling=scaling, dropout=dropout, **kwargs)
    return outputs[0]  # type: ignore[no-any-return]


class _MaskIsNoTensor(UnsupportedAttention, AttributeError):
    """Raised where a layer uses a `LayerMask` as a tensor; an AttributeError, so that `hasattr` returns False."""

    def __init__(self) -> None:
        super().__init__("its layers compute with the attention mask themselves")


class LayerMask:
    """Object that layers receive as `attention_mask`; any use as a tensor raises UnsupportedAttention."""

    ndim = 0  # Falcon adds its own bias to masks of 4 dimensions

    def to(self, *_: Any) -> LayerMask:
        """Return the mask itself: MPT converts its mask to bool."""
        return self

    def __getattr__(self, name: str) -> Any:
        raise _MaskIsNoTensor

    def __getitem__(self, index: Any) -> Any:
        raise _MaskIsNoTensor

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise _MaskIsNoTensor


def set_attention(model: Any, name: str) -> None:
    """Set the attention implementation of a transformers model and of the submodels that support it.

    Raises UnsupportedAttention, with nothing changed, if the layers of the text model do not support it.
    """
    if name in _registered:
        disable_cudnn_sdpa()
    before = attention_of_submodules(model)
    text = model.config.get_text_config(decoder=True)
    if library_internals.get_attention(text) == name:
        return
    if alibi.replaceable_layers(model):
        alibi.use_attention(model, _registered.get(name))
        library_internals.set_attention(model.config, name)
    else:
        model.set_attn_implementation(name)
    if library_internals.get_attention(text) != name:
        restore_attention(model, before)
        raise UnsupportedAttention("its attention layers in transformers cannot be replaced")


def attention_of_submodules(model: Any) -> list[tuple[Any, str]]:
    """Return (config, attention implementation) of `model` and of each submodel, outer models first."""
    from transformers import PreTrainedModel

    submodels = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs = {id(submodel.config): submodel.config for submodel in submodels}
    return [(config, library_internals.get_attention(config)) for config in configs.values()]


def restore_attention(model: Any, before: list[tuple[Any, str]]) -> None:
    """Restore the attention implementations `before` that `attention_of_submodules` returned."""
    alibi.use_attention(model, _registered.get(before[0][1]))
    for config, name in before:  # outer first: transformers passes the setting on to submodels
        if library_internals.get_attention(config) != name:
            library_internals.set_attention(config, name)


def can_set_attention(model_class: Any) -> bool:
    """Return whether `set_attention` works for models of this class."""
    return library_internals.can_set_attention(model_class) or alibi.has_replacements(model_class)


def check_keywords(kwargs: dict[str, Any]) -> None:
    """Raise UnsupportedAttention for an argument of transformers' sdpa that cannot be split into sequences."""
    if kwargs.get("position_bias") is not None:
        raise UnsupportedAttention("its attention adds a bias of its own to every pair of tokens")
    if kwargs.get("is_causal") is False:
        raise UnsupportedAttention("its attention is not causal")


@functools.cache
def _eager_function(layer: type) -> Callable[..., Any]:
    """Return `eager_attention_forward` of the module that defines the attention layer or one of its base classes."""
    for ancestor in layer.__mro__:
        function = getattr(sys.modules.get(ancestor.__module__), "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    raise UnsupportedAttention(f"{layer.__name__} has no eager attention function of its own")
