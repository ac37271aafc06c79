"""Hardware of a plan: machines with accelerators. On a machine without GPUs, each process counts as an accelerator."""

import dataclasses
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from trainer.errors import UserError
from trainer.runtime import malloc
from trainer.settings import PlanSettings
from trainer.storage.configuration import did_you_mean
from trainer.training import gpu_table
from trainer.training.gpu_table import Gpu

_GB = 10**9


@dataclass(frozen=True)
class Accelerator:
    """One GPU, or one process's share of a CPU. Rates are in FLOP/s or bytes/s, and infinite if they are not known."""

    name: str
    memory_bytes: int
    bf16_flops: float
    fp32_flops: float
    memory_bandwidth: float
    link_bandwidth: float  # from one accelerator to another in the same machine, in one direction
    network_bandwidth: float  # of a machine's network connection
    note: str  # source of the numbers
    is_cpu: bool = False
    is_speed_known: bool = True


@dataclass(frozen=True)
class Hardware:
    """Hardware of a plan: `num_nodes` equal machines with `gpus_per_node` accelerators each."""

    accelerator: Accelerator
    num_nodes: int
    gpus_per_node: int
    host_bytes: int  # memory of a machine; 0: not known
    disk_bytes: int  # free disk space; 0: not known

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def unit(self) -> str:
        """Word for an accelerator in messages: "process" or "GPU"."""
        return "process" if self.accelerator.is_cpu else "GPU"


def find_hardware(settings: PlanSettings) -> Hardware:
    """Return the hardware that the settings describe. Raises UserError for an unknown accelerator."""
    accelerator = find_accelerator(settings.gpu, settings.gpus_per_node)
    host = int(settings.host_memory_gb * _GB)
    if accelerator.is_cpu or settings.gpu == "auto":
        host = host or host_memory_bytes()
    if accelerator.is_cpu:
        accelerator = dataclasses.replace(accelerator, memory_bytes=host // settings.gpus_per_node)
    space = int(settings.disk_gb * _GB)
    if not space and settings.output_dir:
        output = Path(settings.output_dir)
        folder = next((path for path in (output, *output.parents) if path.is_dir()), None)
        space = shutil.disk_usage(folder).free if folder else 0
    return Hardware(accelerator, settings.nodes, settings.gpus_per_node, host, space)


def find_accelerator(name: str, gpus_per_node: int) -> Accelerator:
    """Return the accelerator called `name`; for "auto", this machine's accelerator. Raises UserError for an unknown name."""
    key = name.lower().replace("_", "-")
    if key == "auto":
        return _detect(gpus_per_node)
    if key == "cpu":
        return _cpu(gpus_per_node)
    gpu = gpu_table.gpu_by_name(key)
    if gpu is None:
        known = [*gpu_table.names(), "cpu"]
        raise UserError(f"gpu is {name!r}; choose one of {', '.join(known)}{did_you_mean(key, known)}")
    return _from_table(gpu)


def host_memory_bytes() -> int:
    """Return this machine's memory, or the memory limit of the control group if that limit is lower."""
    limit, _ = malloc.control_group_bytes()
    return int(min(psutil.virtual_memory().total, limit))


def _detect(gpus_per_node: int) -> Accelerator:
    import torch

    if not torch.cuda.is_available():
        return _cpu(gpus_per_node)
    device_name = torch.cuda.get_device_name()
    gpu = gpu_table.gpu_by_device_name(device_name)
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
    """Return one process's share of this machine, with guessed rates. time.py replaces the FLOP/s by measured FLOP/s."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1.0, cores / processes)
    note = "this machine's memory and cores; 50 GFLOP/s a core (fp32; the peak of AVX2 at 3 GHz is 96)"
    memory = host_memory_bytes() // processes
    return Accelerator("cpu", memory, 50e9 * share, 50e9 * share, 10e9, 2e9, 1e9, note, is_cpu=True)
