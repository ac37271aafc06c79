"""Estimate the memory of one rank in a training step, in the phase with the most device memory."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from trainer.planning.accelerators import Hardware
from trainer.planning.activations import ActivationTrace, trace_activations
from trainer.planning.workload import Workload
from trainer.planning.zero_memory import ACTIVATIONS, BUCKETS, LOGITS, ZeroMemoryConfig, estimate_phases

CONTEXT = "CUDA context and NCCL"
FRAGMENTATION = "fragmentation"
PROCESS = "process (interpreter, libraries)"
LOADING = "loading the model"

# Assumed: about 0.5 GiB for the CUDA driver and torch's kernels, and about 0.5 GiB for NCCL's channels.
_CUDA_CONTEXT_BYTES = 2**30
# Assumed: the fraction of a step's transient memory that torch's caching allocator cannot reuse.
_FRAGMENTATION = 0.05


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of memory of one rank by component, in the phase with the most device memory. On a CPU, `host` is empty."""

    phase: str
    device: Counter[str]
    host: Counter[str]  # host memory of one rank
    transient_bytes: int  # peak size of activations and logits in the forward and backward pass

    @property
    def device_bytes(self) -> int:
        return self.device.total()

    @property
    def host_bytes(self) -> int:
        return self.host.total()


def trace_micro_batch(workload: Workload, bf16: bool, checkpointing: bool, cuda: bool) -> ActivationTrace:
    """Return the trace of the fullest micro-batch. A second trace with one target token gives the size of the logits."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    full, without_logits = (
        trace_activations(workload.config, list(workload.lengths), num_targets, dtype, checkpointing, cuda)
        for num_targets in (max(1, workload.num_target_tokens), 1)
    )
    logits_bytes = max(0, full.samples[0].bytes - without_logits.samples[0].bytes)
    return dataclasses.replace(full, logits_bytes=logits_bytes)


def estimate_memory(
    workload: Workload,
    deepspeed_config: dict[str, Any],
    hardware: Hardware,
    trace: ActivationTrace,
    process_bytes: int,
    kept_by_glibc: float,
) -> MemoryEstimate:
    """Return the memory in the phase with the largest device memory.

    `process_bytes`: measured resident set of a rank with a tiny model. `kept_by_glibc`: on a CPU, the measured fraction
    of freed activations that malloc keeps in its heap (blocks of up to 32 MB, see M_MMAP_THRESHOLD in mallopt(3)).
    """
    is_cpu = hardware.accelerator.is_cpu
    element_bytes = 2 if deepspeed_config["bf16"]["enabled"] else 4
    sizes, largest_layer = workload.sizes, workload.largest_layer
    config = ZeroMemoryConfig.from_ds_config(
        deepspeed_config, sizes, element_bytes, hardware.world_size, not is_cpu, largest_layer
    )
    worst = max(estimate_phases(config, trace), key=lambda phase: phase.device.total())
    device, host = worst.device, worst.host
    if is_cpu:
        device.update(host)
        device[FRAGMENTATION] += int(kept_by_glibc * trace.peak_bytes)
        device[PROCESS] += process_bytes
        return MemoryEstimate(worst.name, +device, Counter(), trace.peak_bytes)
    host[PROCESS] += process_bytes
    # Stage 3 loads one parameter at a time; other stages load the whole model on the host. If stage 3 starts from random
    # weights, rank 0 also makes the whole model. This estimate does not include that memory.
    loaded = config.largest_parameter if config.stage == 3 else config.num_parameters
    host[LOADING] += config.element_bytes * loaded
    device[FRAGMENTATION] += int(_FRAGMENTATION * (device[ACTIVATIONS] + device[LOGITS] + device[BUCKETS]))
    device[CONTEXT] += _CUDA_CONTEXT_BYTES
    return MemoryEstimate(worst.name, +device, +host, trace.peak_bytes)
