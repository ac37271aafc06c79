"""Attention of one sequence, as transformers' default implementation of a model family computes it.

Packed attention and slot attention split a flat row of tokens into sequences. Where no kernel computes all sequences at
once, they call `attend`. Mask and arithmetic come from transformers:

- transformers passes the family's mask function (causal, sliding window, chunk) to the mask builder that `register` adds.
  `MaskPattern` evaluates this function for the positions of one sequence.
- Families that support sdpa or use ALiBi call torch's `scaled_dot_product_attention`. All other families (soft caps,
  attention sinks) call `eager_attention_forward` of their modeling file.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
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
    """Mask as a function of the positions of query and key in their sequence.

    function: transformers' mask function. max_causal_length: longest sequence (in tokens) whose mask is purely causal.
    """

    def __init__(self, function: _MaskFunction, max_causal_length: float) -> None:
        self._function = function
        self._max_causal_length = max_causal_length

    def is_causal(self, length: int) -> bool:
        """Return whether the mask of `length` tokens is purely causal, i.e. not limited by a window or chunks."""
        return length <= self._max_causal_length

    def visible(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return the mask (True: visible) for int64 positions `queries` and `keys`, which broadcast to the mask's shape."""
        first = torch.zeros((), dtype=torch.int64, device=queries.device)
        return self._function(first, first, queries, keys)


def register(
    name: str, attention: Callable[..., Any], make_mask: Callable[[MaskPattern], "LayerMask"]
) -> None:
    """Register an attention implementation with transformers. Layers get the result of `make_mask` as `attention_mask`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

    def mask(*_: Any, mask_function: Any = causal_mask_function, **options: Any) -> object:
        if options.get("use_vmap") or not getattr(options.get("config"), "is_causal", True):
            raise UnsupportedAttention("its attention mask is not a causal function of positions")
        # In sequences that are not longer than the window or chunk, the mask is purely causal.
        is_causal = mask_function is causal_mask_function
        return make_mask(
            MaskPattern(mask_function, math.inf if is_causal else options.get("local_size") or 0)
        )

    disable_cudnn_sdpa()
    _registered[name] = attention
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def disable_cudnn_sdpa() -> None:
    """Exclude cuDNN's kernel from `scaled_dot_product_attention` in this process.

    On Hopper and Blackwell GPUs, torch 2.11 to 2.13 prefers cuDNN's kernel. This kernel needs 0.4 s of planning for every
    new shape (B200, modelscope/FunASR #3704). Packed examples and generation slots have a new shape at almost every call.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def uses_sdpa(model: Any) -> bool:
    """Return whether sdpa, not eager, is transformers' default attention for `model` (a model or a DeepSpeed engine)."""
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
    alibi_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention output [batch, queries, heads, value head_dim] of a batch of sequences.

    query [batch, heads, queries, head_dim], key and value [batch, key-value heads, keys, ...]. visible: boolean mask that
    broadcasts to [batch, heads, queries, keys]; None: causal mask (requires as many queries as keys).
    alibi_bias [heads, at least `keys` columns]: the first `keys` columns are added to the scores. use_sdpa: result of
    `uses_sdpa`. kwargs: further arguments for the eager function.
    """
    if use_sdpa and alibi_bias is None:
        mask = visible
    else:
        if visible is None:
            length = query.shape[2]
            visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        mask = visible.view((1,) * (4 - visible.dim()) + visible.shape)
        if alibi_bias is not None:
            mask = torch.where(mask, alibi_bias[:, None, : key.shape[2]].to(query.dtype), float("-inf"))
    if use_sdpa or alibi_bias is not None:
        is_causal = mask is None and query.shape[2] > 1
        is_grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal, scale=scaling, enable_gqa=is_grouped
        ).transpose(1, 2)
    assert mask is not None
    additive = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    additive.masked_fill_(~mask, torch.finfo(query.dtype).min)
    eager = _eager_function(type(module))  # type: ignore[arg-type]
    outputs = eager(module, query, key, value, additive, scaling=scaling, dropout=dropout, **kwargs)
    return outputs[0]  # type: ignore[no-any-return]


class _MaskIsNoTensor(UnsupportedAttention, AttributeError):
    """Raised if a layer uses a `LayerMask` as a tensor. Also an AttributeError, so that `hasattr(mask, name)` is False."""

    def __init__(self) -> None:
        super().__init__("its layers compute with the attention mask themselves")


class LayerMask:
    """Base class of the objects that layers receive as `attention_mask`. Use as a tensor raises UnsupportedAttention."""

    ndim = 0  # Falcon would add its own bias to a mask with ndim 4

    def to(self, *_: Any) -> "LayerMask":
        """Return `self`: MPT calls `.to(torch.bool)` on its mask."""
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

    Raises UnsupportedAttention and leaves the model unchanged if the layers of the text model do not support it.
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
        _restore_attention(model, before)
        raise UnsupportedAttention("its attention layers in transformers cannot be replaced")


@contextlib.contextmanager
def evaluation_mode(model: Any, attention: str | None) -> Iterator[None]:
    """Context manager that sets evaluation mode and an attention implementation, and restores the previous ones on exit.

    attention: name of the implementation; None: keep the current one. Raises UnsupportedAttention as `set_attention` does.
    """
    before, training = attention_of_submodules(model), model.training
    model.eval()
    try:
        if attention is not None:
            set_attention(model, attention)
        yield
    finally:
        if attention is not None:
            _restore_attention(model, before)
        model.train(training)


def attention_of_submodules(model: Any) -> list[tuple[Any, str]]:
    """Return (config, attention name) for each config of `model` and its submodels, in the order of `model.modules()`."""
    from transformers import PreTrainedModel

    submodels = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs = {id(submodel.config): submodel.config for submodel in submodels}
    return [(config, library_internals.get_attention(config)) for config in configs.values()]


def _restore_attention(model: Any, before: list[tuple[Any, str]]) -> None:
    alibi.use_attention(model, _registered.get(before[0][1]))
    for config, name in before:  # The setter also changes sub-configs, which come later in `before`.
        if library_internals.get_attention(config) != name:
            library_internals.set_attention(config, name)


def can_set_attention(model_class: Any) -> bool:
    """Return whether `set_attention` works for models of this class."""
    return library_internals.can_set_attention(model_class) or alibi.has_replacements(model_class)


def check_keywords(kwargs: dict[str, Any]) -> None:
    """Raise UnsupportedAttention if a layer's keyword arguments hold a bias per pair of tokens, or switch off causality."""
    if kwargs.get("position_bias") is not None:
        raise UnsupportedAttention("its attention adds a bias of its own to every pair of tokens")
    if kwargs.get("is_causal") is False:
        raise UnsupportedAttention("its attention is not causal")


@functools.cache
def _eager_function(layer: type) -> Callable[..., Any]:
    """Return the first `eager_attention_forward` in the modules that define the class `layer` and its base classes."""
    for ancestor in layer.__mro__:
        function = getattr(sys.modules.get(ancestor.__module__), "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    raise UnsupportedAttention(f"{layer.__name__} has no eager attention function of its own")
