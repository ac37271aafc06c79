"""Cross-entropy that computes the gradient of the logits in place.

Logits are the largest tensor of a small model's step: [target tokens, vocabulary], 120 MB for a pack of 1024 tokens and
GPT-2's vocabulary. torch's cross_entropy allocates two more of that size, and an fp32 copy of bf16 logits. Here blocks
of rows that fit into the processor's cache become probabilities minus one-hot labels in place, so the logits exist once
and are read from memory once. (The idea is Liger Kernel's, arXiv:2410.10989.)

Autograd raises an error if the logits are used again: they are marked as changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

_CPU_BLOCK_BYTES = 2 << 20  # of fp32 rows: about the second-level cache
_ACCELERATOR_BLOCK_BYTES = 256 << 20  # enough rows to keep an accelerator busy


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of the losses in nats (fp32, differentiable); overwrites logits [L, vocabulary]. labels: [L] int64."""
    loss: torch.Tensor = _SummedCrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        block_bytes = _CPU_BLOCK_BYTES if logits.device.type == "cpu" else _ACCELERATOR_BLOCK_BYTES
        num_rows = max(1, block_bytes // (4 * logits.shape[1]))
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for block, targets in zip(logits.split(num_rows), labels.unsqueeze(1).split(num_rows), strict=True):
            log_probabilities = block.float().log_softmax(1)
            of_targets = log_probabilities.gather(1, targets)
            total -= of_targets.sum(dtype=torch.float64)
            if ctx.needs_input_grad[0]:
                torch.exp(log_probabilities, out=block)
                block.scatter_(1, targets, of_targets.exp_().sub_(1).to(block.dtype))
        ctx.save_for_backward(logits)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(loss_gradient), None
