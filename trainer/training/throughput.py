"""Training FLOPs per token, peak FLOP/s of the GPU, and peak memory of this rank."""

import contextlib
import re
import resource
from pathlib import Path
from typing import Any

import torch

from trainer.training import gpu_table


def flops_per_token(
    num_parameters: int, config: Any, mean_length: float, target_fraction: float = 1.0
) -> float:
    """Return the FLOPs per token of the forward and backward pass, without recomputation: 6 N + 6 L d n.

    N: parameters without the token embedding. The parameters of the output head are multiplied by `target_fraction`, the
    fraction of tokens that need the head. L: layers. d: width. n: `mean_length` of the sequences. The formula is from
    Chowdhery et al. 2022, appendix B (see also Kaplan et al. 2020). The attention term of the paper, 12 L d n, is halved,
    because with a causal mask a query attends to n / 2 tokens on average.
    """
    layers, width = config.num_hidden_layers, config.hidden_size
    head = config.vocab_size * width
    tied = getattr(config, "tie_word_embeddings", False)
    inside = num_parameters - (head if tied else 2 * head)
    return float(6.0 * (inside + target_fraction * head) + 6.0 * layers * width * mean_length)


def peak_flops(dtype: str = "bf16") -> float | None:
    """Return the peak FLOP/s of this rank's GPU in `dtype` (bf16 or fp32), or None on a CPU or an unknown GPU."""
    if not torch.cuda.is_available():
        return None
    gpu = gpu_table.gpu_by_device_name(torch.cuda.get_device_name())
    return None if gpu is None else gpu.peak_flops(dtype)


def peak_memory_bytes() -> int:
    """Return the peak memory of this rank: memory allocated on the GPU, or resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if match := re.search(r"^VmHWM:\s*(\d+)", status, re.MULTILINE):
            return int(match[1]) * 1024
    # ru_maxrss is only the fallback, because it starts with the peak of the parent process.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
