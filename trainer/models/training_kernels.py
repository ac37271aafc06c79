"""A model's own formulas, computed by the faster of two kernels. Values agree to fp32's rounding.

Neither the config nor the weights know of it. Measured on a core of an EPYC with AVX-512: GPT-2's head at 600 positions
runs at 56 GFLOP/s in MKL, which `torch.nn.Linear` calls, and at 90 in oneDNN; the spelled-out GELU is eight passes over
memory instead of one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.functional import linear


def use(model: Any) -> None:
    """Give a transformers model, whole or in ZeRO-3's shards, the faster kernels."""
    from transformers.activations import NewGELUActivation

    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear and head.bias is None and torch.backends.mkldnn.is_available():
        head.forward = functools.partial(_project, head)


def _project(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """hidden [..., width] -> logits [..., vocabulary]."""
    if hidden.device.type != "cpu" or hidden.dtype != torch.float32:
        return linear(hidden, head.weight)  # in bf16 torch takes oneDNN by itself
    logits: torch.Tensor = _Projection.apply(hidden.flatten(0, -2), head.weight)
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
