"""Arithmetic of a step: floating-point operations, and what part of the device's peak they are."""

from __future__ import annotations

import contextlib
import resource
import sys
from typing import Any

import torch

from trainer.training import gpu_table


def flops_per_token(num_parameters: int, config: Any, mean_length: float, learned_part: float = 1.0) -> float:
    """Forward and backward, recomputation not counted: 6 N + 6 L d n for causal attention over n tokens.

    N counts parameters outside the input embedding; every query looks at half of the sequence on average. (Kaplan
    et al. 2020, appendix; Chowdhery et al. 2022, appendix B, halved for the causal mask.) `learned_part`: of the tokens;
    the vocabulary's head is applied to no others, and what is not computed is no utilisation.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    head = config.vocab_size * width
    tied = getattr(config, "tie_word_embeddings", False)
    inside = num_parameters - (head if tied else 2 * head)
    return 6.0 * (inside + learned_part * head) + 6.0 * layers * width * mean_length


def peak_flops(dtype: str = "bf16") -> float | None:
    """Return the peak of this rank's GPU in `dtype` (bf16 or fp32), in FLOP/s.

    None on a CPU and for a GPU that is not in the table: MFU is unknown there.
    """
    if not torch.cuda.is_available():
        return None
    gpu = gpu_table.by_device_name(torch.cuda.get_device_name())
    return None if gpu is None else gpu.peak_flops(dtype)


def peak_memory_bytes() -> int:
    """Most memory this rank ever used: allocated on the GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Not ru_maxrss where it can be helped: on Linux that begins with what the process that started this one had.
    with (
        contextlib.suppress(OSError),
        open("/proc/self/status", encoding="ascii", errors="replace") as status,
    ):
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
