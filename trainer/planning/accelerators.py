"""Accelerators of a plan: a GPU of the table, an unknown GPU of this machine, or a share of this machine's CPU."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import psutil

from trainer.errors import UserError
from trainer.runtime import malloc
from trainer.storage.configuration import did_you_mean
from trainer.training import gpu_table
from trainer.training.gpu_table import Gpu

GB = 10**9


@dataclass(frozen=True)
class Accelerator:
    """One GPU, or one process's share of a CPU. Rates are FLOP/s and bytes/s.

    `link`: between accelerators of a machine, in one direction; `network`: of a machine. Rates are infinite if the
    speed is not known, so that they add no seconds to a measured rate.
    """

    name: str
    memory_bytes: int
    bf16_flops: float
    fp32_flops: float
    memory_bandwidth: float
    link: float
    network: float
    note: str  # source of the numbers
    is_cpu: bool = False
    is_speed_known: bool = True


def find_accelerator(name: str, per_machine: int) -> Accelerator:
    """Return an accelerator by name, or this machine's for `auto`. Raises UserError for an unknown name."""
    wanted = name.lower().replace("_", "-")
    if wanted == "auto":
        return _detect(per_machine)
    if wanted == "cpu":
        return _cpu(per_machine)
    gpu = gpu_table.by_name(wanted)
    if gpu is None:
        known = [*gpu_table.names(), "cpu"]
        raise UserError(f"gpu is {name!r}; choose one of {', '.join(known)}{did_you_mean(wanted, known)}")
    return _from_table(gpu)


def host_memory_bytes() -> int:
    """Return the memory of this machine, or the limit of the control group if it is lower."""
    limit, _ = malloc.control_group_bytes()
    return int(min(psutil.virtual_memory().total, limit))


def _detect(per_machine: int) -> Accelerator:
    import torch

    if not torch.cuda.is_available():
        return _cpu(per_machine)
    device_name = torch.cuda.get_device_name()
    gpu = gpu_table.by_device_name(device_name)
    if gpu is not None:
        return _from_table(gpu)
    memory = torch.cuda.get_device_properties(0).total_memory
    note = "memory as torch reports it; not in the table of GPUs, so its speed is unknown"
    return Accelerator(device_name, memory, *(math.inf,) * 5, note, is_speed_known=False)


def _from_table(gpu: Gpu) -> Accelerator:
    rates = (gpu.peak_flops("bf16"), gpu.peak_flops("fp32"), gpu.memory_bandwidth)
    links = (gpu.link_bandwidth, gpu.network_bandwidth)
    return Accelerator(gpu.name, gpu.memory_bytes, *rates, *links, f"{gpu.source}; {gpu.link}")


def _cpu(processes: int) -> Accelerator:
    """Return one process's share of this machine. The rates are a guess, replaced by measured.json or `--calibrate`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1.0, cores / processes)
    note = "this machine's memory and cores; 50 GFLOP/s a core (fp32; the peak of AVX2 at 3 GHz is 96)"
    memory = host_memory_bytes() // processes
    return Accelerator("cpu", memory, 50e9 * share, 50e9 * share, 10e9, 2e9, 1e9, note, is_cpu=True)
