"""Floating-point operations of a step, and the peak performance and memory use of the device."""

from __future__ import annotations

import contextlib
import resource
from typing import Any

import torch

from trainer.training import gpu_table


def flops_per_token(
    num_parameters: int, config: Any, mean_length: float, target_fraction: float = 1.0
) -> float:
    """Return the FLOPs of forward and backward, without recomputation: 6 N + 6 L d n for causal attention over n tokens.

    N counts parameters outside the input embedding; a query attends to half of the sequence on average. (Kaplan et al.
    2020, appendix; Chowdhery et al. 2022, appendix B, halved for the causal mask.) `target_fraction`: share of the
    tokens that are targets; the head is computed for these alone.
    """
    width: int = config.hidden_size
    layers: int = config.num_hidden_layers
    head: int = config.vocab_size * width
    tied = getattr(config, "tie_word_embeddings", False)
    inside = num_parameters - (head if tied else 2 * head)
    return 6.0 * (inside + target_fraction * head) + 6.0 * layers * width * mean_length


def peak_flops(dtype: str = "bf16") -> float | None:
    """Return the peak of this rank's GPU in `dtype` (bf16 or fp32), in FLOP/s.

    None on a CPU and for a GPU that is not in the table: MFU is unknown there.
    """
    if not torch.cuda.is_available():
        return None
    gpu = gpu_table.by_device_name(torch.cuda.get_device_name())
    return None if gpu is None else gpu.peak_flops(dtype)


def peak_memory_bytes() -> int:
    """Return the peak memory of this rank: allocated on the GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # ru_maxrss is only the fallback: it starts with the peak of the parent process.
    with (
        contextlib.suppress(OSError),
        open("/proc/self/status", encoding="ascii", errors="replace") as status,
    ):
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
