"""Estimate of the memory of one rank in the worst phase of a step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from trainer.planning.accelerators import Accelerator
from trainer.planning.activations import ActivationTrace, trace_activations
from trainer.planning.workload import Workload
from trainer.planning.zero_memory import (
    ACTIVATIONS,
    BUCKETS,
    LOGITS,
    Phase,
    ZeroMemoryConfig,
    estimate_phases,
)

CONTEXT = "CUDA context and NCCL"
FRAGMENTATION = "fragmentation"
PROCESS = "process (interpreter, libraries)"
LOADING = "loading the model"

# Assumed: driver and kernels of torch (about 0.5 GiB), and NCCL's channels (about 0.5 GiB).
_CUDA_CONTEXT_BYTES = 2**30
# Assumed: the part of a step's transient memory that torch's caching allocator cannot reuse.
_FRAGMENTATION = 0.05
_TRANSIENT = (ACTIVATIONS, LOGITS, BUCKETS)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by component in the worst phase of a rank. On a CPU `device` is the memory of the process."""

    phase: str
    device: Counter[str]
    host: Counter[str]  # of one rank
    transient_bytes: int  # peak of activations and logits over all phases

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def trace_phases(
    workload: Workload, bf16: bool, checkpointing: bool, cuda: bool
) -> tuple[ActivationTrace, int]:
    """Return the trace of the fullest micro-batch, and the bytes of its peak that are due to the logits."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    full, without = (
        trace_activations(workload.config, list(workload.lengths), learned_tokens, dtype, checkpointing, cuda)
        for learned_tokens in (max(1, workload.num_target_tokens), 1)
    )
    return full, max(0, full.samples[0].bytes - without.samples[0].bytes)


def estimate_memory(
    workload: Workload,
    resolved: dict[str, Any],
    accelerator: Accelerator,
    world_size: int,
    traced: tuple[ActivationTrace, int],
    process_bytes: int,
    kept_by_glibc: float,
) -> MemoryEstimate:
    """Return the phase with the largest device memory.

    `traced`: of `trace_phases`. `process_bytes`: measured resident set of a rank with a tiny model. `kept_by_glibc`: on
    a CPU, the measured fraction of freed activations that malloc keeps in its heap; blocks up to 32 MB are not returned
    to the system (mallopt(3), M_MMAP_THRESHOLD).
    """
    element_bytes = 2 if resolved["bf16"]["enabled"] else 4
    sizes, on_accelerator = list(workload.sizes), not accelerator.is_cpu
    layout = ZeroMemoryConfig.from_ds_config(
        resolved, sizes, element_bytes, world_size, on_accelerator, workload.largest_layer
    )
    worst = max(estimate_phases(layout, *traced), key=Phase.device_bytes)
    device, host = worst.device, worst.host
    if accelerator.is_cpu:
        device.update(host)
        device[FRAGMENTATION] += int(kept_by_glibc * traced[0].peak_bytes)
        device[PROCESS] += process_bytes
        return MemoryEstimate(worst.name, +device, Counter(), traced[0].peak_bytes)
    host[PROCESS] += process_bytes
    # Rank 0 makes random weights whole; pretrained ones are read file by file.
    loaded = layout.largest_parameter if layout.stage == 3 else layout.num_parameters
    host[LOADING] += layout.element_bytes * loaded
    device[FRAGMENTATION] += int(_FRAGMENTATION * sum(device[name] for name in _TRANSIENT))
    device[CONTEXT] += _CUDA_CONTEXT_BYTES
    return MemoryEstimate(worst.name, +device, +host, traced[0].peak_bytes)
