"""Faster kernels for GELU, RMS norm and the language model head. They change rounding only, not config or weights.

GELU: transformers makes eight passes over memory; the kernel here makes one pass. RMS norm: transformers launches six
kernels; here one kernel is launched. Head on a CPU: `torch.nn.Linear` (MKL) reaches 56 GFLOP/s and oneDNN 90 GFLOP/s,
measured on one core of an EPYC with AVX-512 (GPT-2, 600 positions). Head on an H200: if the vocabulary size is not a
multiple of 64 (GPT-2: 50257), torch uses slow kernels of an older generation. In a training step of a 124M model, the head
then takes a third of the time.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import gelu, linear, pad, rms_norm

from trainer.runtime import library_internals

# On an accelerator, zero rows are appended to the head's weight [vocabulary, width] up to a multiple of this number of rows.
_VOCABULARY_MULTIPLE = 64
# Classes of transformers that compute weight * (x / sqrt(mean(x^2) + epsilon)).
_RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def patch_kernels(model: Any, on_accelerator: bool) -> None:
    """Replace kernels of a transformers model with faster kernels. Works for models partitioned by ZeRO-3 too."""
    from transformers.activations import NewGELUActivation

    forwards: list[tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]] = []
    if on_accelerator:  # on a CPU, torch has no fused RMS norm
        forwards += [(norm, functools.partial(_normalise, norm)) for norm in rms_norms(model)]
    fast_gelu = functools.partial(gelu, approximate="tanh")
    forwards += [(module, fast_gelu) for module in model.modules() if type(module) is NewGELUActivation]
    head = model.get_output_embeddings()
    function = _projection(head, on_accelerator)
    if function is not None:
        forwards.append((head, functools.partial(_project, head, function)))
    model._kernel_replacements = forwards
    for module, forward in forwards:
        module.forward = forward


@contextlib.contextmanager
def unpatched(model: Any) -> Iterator[None]:
    """Context manager in which `model` uses transformers' own kernels. Does nothing if the model is not patched."""
    forwards = getattr(model, "_kernel_replacements", [])
    for module, _ in forwards:
        del module.forward  # the forward method of the class applies again
    try:
        yield
    finally:
        for module, forward in forwards:
            module.forward = forward


def _projection(head: Any, on_accelerator: bool) -> type[torch.autograd.Function] | None:
    """Return a faster autograd function for a head's logits, or None if the head keeps torch's `linear`."""
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
        return linear(hidden, head.weight)  # in bf16, torch itself uses oneDNN
    logits: torch.Tensor = function.apply(hidden.flatten(0, -2), head.weight)
    return logits.unflatten(0, hidden.shape[:-1])


class _Projection(torch.autograd.Function):
    """hidden @ weight^T by oneDNN. In the backward pass, torch's default (MKL) is as fast as oneDNN, so MKL is used."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        return library_internals.linear_by_onednn(hidden, weight, None)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ hidden


class _AlignedProjection(torch.autograd.Function):
    """hidden [tokens, width] @ weight^T [width, vocabulary], padded to a multiple of _VOCABULARY_MULTIPLE columns.

    The logits are a view of the padded product. cross_entropy.py overwrites this view with the gradient of the logits, so
    the backward pass uses the same padded memory and copies no gradient. The forward and the backward pass each make a
    padded copy of the weight. This copy takes little time compared with a product of many rows.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        wide = hidden @ _aligned(weight).t()
        # Do not return the view `wide[:, :n]`: autograd raises an error if a view that a Function returns is overwritten.
        shape = len(hidden), weight.shape[0]
        return wide.new_empty(0).set_(wide.untyped_storage(), 0, shape, wide.stride())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight = ctx.saved_tensors
        vocabulary, wide_weight = weight.shape[0], _aligned(weight)
        rows, width = len(gradient), len(wide_weight)
        padded_bytes = rows * width * gradient.element_size()
        if gradient.stride() == (width, 1) and gradient.untyped_storage().nbytes() == padded_bytes:
            wide = gradient.as_strided((rows, width), (width, 1))
            wide[:, vocabulary:] = 0
        else:
            wide = pad(gradient, (0, width - vocabulary))
        return wide @ wide_weight, (wide.t() @ hidden)[:vocabulary]


def _aligned(weight: torch.Tensor) -> torch.Tensor:
    return pad(weight, (0, 0, 0, -weight.shape[0] % _VOCABULARY_MULTIPLE))
