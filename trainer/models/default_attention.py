"""Attention of one sequence, as transformers' default implementation of a model family computes it.

Attention over packs and attention over generation slots both cut a flat row of tokens into sequences and call `attend`
for each. Two things are taken from transformers instead of being written again:

- The mask. Transformers calls a registered mask function with its own rule of which key a query sees (causal, sliding
  window, chunk). `MaskPattern` keeps that rule and evaluates it for the positions of one sequence.
- The arithmetic. Families that support sdpa get torch's kernel, as transformers gives them. All others (soft caps,
  attention sinks) get the `eager_attention_forward` of their own modeling file.
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
from trainer.models.attention_kernels import disable_cudnn_sdpa

_MaskFunction = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]  # batch, head, query, key


_registered: dict[str, Callable[..., Any]] = {}


class UnsupportedAttention(RuntimeError):
    """The model's attention cannot be computed sequence by sequence; the message says why."""


class MaskPattern:
    """The rule of the keys that a query sees, as a function of both positions within one sequence."""

    def __init__(self, function: _MaskFunction, longest_causal: float) -> None:
        """`function`: transformers' mask function. `longest_causal`: up to this length it is plain causal attention."""
        self._function = function
        self._longest_causal = longest_causal

    def is_causal(self, length: int) -> bool:
        """Return whether the pattern is plain causal attention for sequences of up to `length` tokens."""
        return length <= self._longest_causal

    def visible(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return a boolean mask; positions `queries` and `keys` (int64) broadcast against each other."""
        first = torch.zeros((), dtype=torch.int64, device=queries.device)
        return self._function(first, first, queries, keys)

    def square(self, length: int, device: torch.device) -> torch.Tensor:
        """Return the boolean mask [length, length] of a whole sequence; shorter sequences have its upper left corner."""
        positions = torch.arange(length, device=device)
        return self.visible(positions[:, None], positions[None, :])


def register(name: str, attention: Callable[..., Any], make_mask: Callable[[MaskPattern], LayerMask]) -> None:
    """Make an attention implementation known to transformers; layers get what `make_mask` returns as `attention_mask`."""
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
        longest_causal = math.inf if mask_function is causal_mask_function else local_size or 0
        return make_mask(MaskPattern(mask_function, longest_causal))

    disable_cudnn_sdpa()
    _registered[name] = attention
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def uses_sdpa(model: Any) -> bool:
    """Return whether transformers would choose sdpa for this model (or the engine around it), else eager."""
    return bool(getattr(getattr(model, "module", model), "_supports_sdpa", False))


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    sdpa: bool,
    others: dict[str, Any],
    key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention of `batch` sequences [batch, queries, heads, value head size].

    query [batch, heads, queries, head size], key and value [batch, key-value heads, keys, ...]. visible: boolean mask
    that broadcasts to [batch, heads, queries, keys]; None: causal, as many keys as queries. key_bias [heads, at least
    keys]: added to the scores of the keys (alibi.py). others: what the layer hands its attention function besides; the
    family's own eager function takes it.
    """
    if sdpa and key_bias is None:
        mask = visible
    else:
        if visible is None:
            length = query.shape[2]
            visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        mask = visible.view((1,) * (4 - visible.dim()) + visible.shape)
        if key_bias is not None:
            mask = torch.where(mask, key_bias[:, None, : key.shape[2]].to(query.dtype), float("-inf"))
    if sdpa or key_bias is not None:
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
    output: torch.Tensor = eager(
        module, query, key, value, additive, scaling=scaling, dropout=dropout, **others
    )[0]
    return output


class _MaskIsNoTensor(UnsupportedAttention, AttributeError):
    """Raised where a layer treats a `LayerMask` as a tensor; an AttributeError, so that `hasattr` returns False."""

    def __init__(self) -> None:
        super().__init__("its layers compute with the attention mask themselves")


class LayerMask:
    """The `attention_mask` that layers receive. It is no tensor; families that look at its shape find none."""

    ndim = 0  # Falcon adds its own bias to masks of 4 dimensions

    def to(self, *_: Any) -> LayerMask:
        """Return the mask itself: MPT asks for a boolean one."""
        return self

    def __getattr__(self, name: str) -> Any:
        raise _MaskIsNoTensor

    def __getitem__(self, index: Any) -> Any:
        raise _MaskIsNoTensor

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise _MaskIsNoTensor


def set_attention(model: Any, name: str) -> None:
    """Set the attention implementation of a transformers model, and of those of its parts that let it be set.

    Raises UnsupportedAttention if the layers of its text part compute attention in a way of their own; then nothing is
    changed.
    """
    if name in _registered:
        disable_cudnn_sdpa()
    before = attention_of_submodules(model)
    text = model.config.get_text_config(decoder=True)
    if text._attn_implementation == name:
        return
    if alibi.replaceable_layers(model):
        _use_layers_for(model, name)
        model.config._attn_implementation = name
    else:
        model.set_attn_implementation(name)
    if text._attn_implementation != name:
        restore_attention(model, before)
        raise UnsupportedAttention("its attention layers in transformers cannot be replaced")


def attention_of_submodules(model: Any) -> list[tuple[Any, str]]:
    """Return the config of each part of a model with its attention implementation, wholes before their parts."""
    from transformers import PreTrainedModel

    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    return [(config, config._attn_implementation) for config in configs.values()]


def restore_attention(model: Any, before: list[tuple[Any, str]]) -> None:
    """Give every part the implementation that `attention_of_parts` returned for it."""
    _use_layers_for(model, before[0][1])
    for config, name in before:  # setting that of a whole sets those of its parts
        if config._attn_implementation != name:
            config._attn_implementation = name


def _use_layers_for(model: Any, name: str) -> None:
    alibi.restore_layers(model)
    if name in _registered:
        alibi.replace_layers(model, _registered[name])


def can_set_attention(model_class: Any) -> bool:
    """Return whether `set_attention` works for models of this class."""
    return bool(model_class._can_set_attn_implementation()) or alibi.has_replacements(model_class)


def check_keywords(others: dict[str, Any]) -> None:
    """Raise UnsupportedAttention for an argument that transformers' sdpa honours and that cannot be cut into sequences."""
    if others.get("position_bias") is not None:
        raise UnsupportedAttention("its attention adds a bias of its own to every pair of tokens")
    if others.get("is_causal") is False:
        raise UnsupportedAttention("its attention also looks ahead")


@functools.cache
def _eager_function(layer: type) -> Callable[..., Any]:
    """Return `eager_attention_forward` of the file in which the attention layer, or the class it derives from, is defined."""
    for ancestor in layer.__mro__:
        function = getattr(sys.modules.get(ancestor.__module__), "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    raise UnsupportedAttention(f"{layer.__name__} has no eager attention function of its own")
