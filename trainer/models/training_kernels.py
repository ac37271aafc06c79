"""A model's own formulas, computed by the faster of two kernels. Values agree to the rounding of their precision.

Neither the config nor the weights know of it. Measured on a core of an EPYC with AVX-512: GPT-2's head at 600 positions
runs at 56 GFLOP/s in MKL, which `torch.nn.Linear` calls, and at 90 in oneDNN; the spelled-out GELU is eight passes over
memory instead of one. On an H200 the products with GPT-2's 50257 tokens, whose rows begin at odd addresses, took kernels of an
older generation and a third of a step of 124M; the spelled-out RMS norm is six kernels instead of one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear, pad, rms_norm

_ALIGNED = 64  # rows of a head on an accelerator: a multiple of this
# Of transformers, all of one formula: weight * (x / sqrt(mean(x^2) + epsilon)).
_RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


@dataclass(frozen=True)
class _Replacement:
    """An attribute of a module, as it was (None: the class's own method) and as it is."""

    owner: torch.nn.Module
    name: str
    before: Any
    after: Any


def patch_kernels(model: Any, on_accelerator: bool) -> None:
    """Give a transformers model, whole or in ZeRO-3's shards, the kernels that are faster where it will be."""
    from transformers.activations import NewGELUActivation

    replacements = []
    if on_accelerator:  # on a CPU torch spells the formula out too
        for norm in rms_norms(model):
            replacements.append(_Replacement(norm, "forward", None, functools.partial(_normalise, norm)))
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                replacements.append(_Replacement(module, name, child, torch.nn.GELU(approximate="tanh")))
    head = model.get_output_embeddings()
    function = _projection(head, on_accelerator)
    if function is not None:
        replacements.append(_Replacement(head, "forward", None, functools.partial(_project, head, function)))
    model._kernel_replacements = replacements
    _replace(replacements)


@contextlib.contextmanager
def unpatched(model: Any) -> Iterator[None]:
    """Context manager inside which `model` computes with transformers' own kernels, whether or not `use` was called."""
    replacements = getattr(model, "_kernel_replacements", [])
    for replacement in replacements:
        if replacement.before is None:
            delattr(replacement.owner, replacement.name)
        else:
            setattr(replacement.owner, replacement.name, replacement.before)
    try:
        yield
    finally:
        _replace(replacements)


def _replace(replacements: list[_Replacement]) -> None:
    for replacement in replacements:
        setattr(replacement.owner, replacement.name, replacement.after)


def _projection(head: Any, on_accelerator: bool) -> type[torch.autograd.Function] | None:
    """Return the faster product for a language model head, None if torch's own is as good."""
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return None
    if on_accelerator and head.out_features % _ALIGNED:
        return _AlignedProjection
    if not on_accelerator and torch.backends.mkldnn.is_available():
        return _Projection
    return None


def rms_norms(model: torch.nn.Module) -> list[Any]:
    """The modules that compute an RMS norm with a weight [width] and a `variance_epsilon`."""
    return [module for module in model.modules() if type(module).__name__ in _RMS_NORMS]


def _normalise(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """hidden [..., width]."""
    return rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _project(head: torch.nn.Linear, function: Any, hidden: torch.Tensor) -> torch.Tensor:
    """hidden [..., width] -> logits [..., vocabulary]."""
    if function is _Projection and hidden.dtype != torch.float32:
        return linear(hidden, head.weight)  # in bf16 torch takes oneDNN by itself
    logits: torch.Tensor = function.apply(hidden.flatten(0, -2), head.weight)
    return logits.unflatten(0, hidden.shape[:-1])


class _Projection(torch.autograd.Function):
    """hidden @ weight^T. The two products of the backward pass are as fast in MKL."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        logits: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ hidden


class _AlignedProjection(torch.autograd.Function):
    """hidden [L, width] @ weight^T [width, vocabulary], as if the vocabulary had some more tokens that nobody sees.

    The logits lie in rows of an aligned length; a gradient that is written over them (cross_entropy.py) does so too.
    The weight is copied for it, which is little beside a product with many rows.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        wide = hidden @ _aligned(weight).t()
        # Not a view for autograd, which would forbid to write over it.
        return wide.new_empty(0).set_(
            wide.untyped_storage(), 0, (len(hidden), weight.shape[0]), wide.stride()
        )

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight = ctx.saved_tensors
        tokens, wide_weight = weight.shape[0], _aligned(weight)
        rows, width = len(gradient), len(wide_weight)
        if gradient.stride() == (width, 1) and gradient.untyped_storage().nbytes() == (
            rows * width * gradient.element_size()
        ):
            wide = gradient.as_strided((rows, width), (width, 1))
            wide[:, tokens:] = 0
        else:
            wide = pad(gradient, (0, width - tokens))
        return wide @ wide_weight, (wide.t() @ hidden)[:tokens]


def _aligned(weight: torch.Tensor) -> torch.Tensor:
    """[vocabulary, width] with rows of zeros behind, up to a multiple of 64."""
    return pad(weight, (0, 0, 0, -weight.shape[0] % _ALIGNED))
