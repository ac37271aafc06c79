"""Faster kernels for GELU, RMS norm and the language model head; values agree to rounding, config and weights are unchanged.

On one core of an EPYC with AVX-512 GPT-2's head at 600 positions runs at 56 GFLOP/s in MKL, which `torch.nn.Linear`
calls, and at 90 in oneDNN; transformers' GELU is eight passes over memory instead of one. On an H200 the products with
GPT-2's vocabulary of 50257, whose rows are not aligned, ran in kernels of an older generation and took a third of a
training step of 124M; transformers' RMS norm is six kernels instead of one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import gelu, linear, pad, rms_norm

from trainer.runtime import library_internals

_VOCABULARY_MULTIPLE = 64  # on an accelerator the head's rows are padded to a multiple of this
# transformers' classes with the formula weight * (x / sqrt(mean(x^2) + epsilon)).
_RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def patch_kernels(model: Any, on_accelerator: bool) -> None:
    """Replace kernels of a transformers model, whole or in ZeRO-3 shards, by the faster ones for its device."""
    from transformers.activations import NewGELUActivation

    forwards: list[tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]] = []
    if on_accelerator:  # on a CPU torch has no fused RMS norm
        forwards += [(norm, functools.partial(_normalise, norm)) for norm in rms_norms(model)]
    for module in model.modules():
        if type(module) is NewGELUActivation:
            forwards.append((module, functools.partial(gelu, approximate="tanh")))
    head = model.get_output_embeddings()
    function = _projection(head, on_accelerator)
    if function is not None:
        forwards.append((head, functools.partial(_project, head, function)))
    model._kernel_replacements = forwards
    for module, forward in forwards:
        module.forward = forward


@contextlib.contextmanager
def unpatched(model: Any) -> Iterator[None]:
    """Context manager in which `model` uses transformers' own kernels, whether or not it was patched."""
    forwards = getattr(model, "_kernel_replacements", [])
    for module, _ in forwards:
        del module.forward  # uncovers the class's own
    try:
        yield
    finally:
        for module, forward in forwards:
            module.forward = forward


def _projection(head: Any, on_accelerator: bool) -> type[torch.autograd.Function] | None:
    """Return the faster product for a language model head; None if torch's own is as fast."""
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return None
    if on_accelerator and head.out_features % _VOCABULARY_MULTIPLE:
        return _AlignedProjection
    if not on_accelerator and torch.backends.mkldnn.is_available():
        return _Projection
    return None


def rms_norms(model: torch.nn.Module) -> list[Any]:
    """Return the modules that compute an RMS norm with a weight [width] and a `variance_epsilon`."""
    return [module for module in model.modules() if type(module).__name__ in _RMS_NORMS]


def _normalise(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _project(head: torch.nn.Linear, function: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return logits [..., vocabulary] for hidden [..., width]."""
    if function is _Projection and hidden.dtype != torch.float32:
        return linear(hidden, head.weight)  # in bf16 torch uses oneDNN itself
    logits: torch.Tensor = function.apply(hidden.flatten(0, -2), head.weight)
    return logits.unflatten(0, hidden.shape[:-1])


class _Projection(torch.autograd.Function):
    """hidden @ weight^T in oneDNN. The two products of the backward pass are as fast in MKL."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        logits: torch.Tensor = library_internals.linear_by_onednn(hidden, weight, None)
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ hidden


class _AlignedProjection(torch.autograd.Function):
    """hidden [tokens, width] @ weight^T [width, vocabulary] with the vocabulary padded to an aligned size.

    The logits are a view of the padded product; so is a gradient that is written over them (cross_entropy.py). Each call
    copies the weight, which costs little beside a product with many rows.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        wide = hidden @ _aligned(weight).t()
        # Not a view for autograd, which would forbid writing over it.
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
    """Return the weight [vocabulary, width] padded with rows of zeros to a multiple of _VOCABULARY_MULTIPLE."""
    return pad(weight, (0, 0, 0, -weight.shape[0] % _VOCABULARY_MULTIPLE))
