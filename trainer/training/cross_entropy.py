"""Cross-entropy that turns the logits into their own gradient.

Logits are the largest tensor of a small student's step: [learned positions, vocabulary], 120 MB for a pack of 1024 tokens
and GPT-2's vocabulary. torch's cross_entropy makes two more of that size, and an fp32 copy of bf16 logits. Here a few
rows at a time, small enough for the processor's cache, become probabilities minus the one-hot labels in place, so that
the logits exist once and are read from memory once. (The idea is Liger Kernel's, arXiv:2410.10989.)

A second use of the logits after this would be an error that autograd reports: they are marked as changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

_CACHE_BYTES = 2 << 20  # of fp32 rows at a time on a CPU: about its second-level cache
_ACCELERATOR_BYTES = 256 << 20  # enough rows to keep an accelerator busy


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the losses in nats, fp32, with its graph; logits [L, vocabulary] are overwritten, labels [L] (int64)."""
    loss: torch.Tensor = _SummedCrossEntropy.apply(logits, labels)
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        limit = _CACHE_BYTES if logits.device.type == "cpu" else _ACCELERATOR_BYTES
        rows = max(1, limit // (4 * logits.shape[1]))
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for part, wanted in zip(logits.split(rows), labels.unsqueeze(1).split(rows), strict=True):
            log_probabilities = part.float().log_softmax(1)
            of_labels = log_probabilities.gather(1, wanted)
            total -= of_labels.sum(dtype=torch.float64)
            if ctx.needs_input_grad[0]:
                torch.exp(log_probabilities, out=part)
                part.scatter_(1, wanted, of_labels.exp_().sub_(1).to(part.dtype))
        ctx.save_for_backward(logits)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(loss_gradient), None
