"""Cross-entropy that computes the gradient of the logits in place.

The logits [target tokens, vocabulary] are the largest tensor of a small model's step: 120 MB in fp32 for 600 target
tokens and GPT-2's vocabulary. torch's cross_entropy allocates two more tensors of that size, and an fp32 copy of bf16
logits. Here the logits are processed in blocks of rows, and each block is overwritten by its gradient (probabilities
minus one-hot labels), so no second tensor of that size is needed. On a CPU a block fits into the cache, so each logit is
read from memory once. (The idea is Liger Kernel's, arXiv:2410.10989.)

Do not use the logits afterwards. Autograd raises an error if the backward pass of an earlier operation needs them.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

CPU_BLOCK_BYTES = 2 << 20  # fp32 size of a block of rows; about the size of a core's L2 cache
ACCELERATOR_BLOCK_BYTES = 256 << 20  # large enough to use all cores of the accelerator


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed loss in nats (fp32). `logits` [L, vocabulary] are overwritten if they require a gradient."""
    loss: torch.Tensor = _SummedCrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return loss


def block_bytes(device: torch.device) -> int:
    return CPU_BLOCK_BYTES if device.type == "cpu" else ACCELERATOR_BLOCK_BYTES


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        num_rows = max(1, block_bytes(logits.device) // (4 * logits.shape[1]))
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
