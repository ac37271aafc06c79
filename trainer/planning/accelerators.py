"""What accelerators can do, by name: bytes, FLOP/s and bytes/s of the vendors' data sheets, dense (no sparsity)."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

from trainer.errors import UserError
from trainer.runtime import malloc
from trainer.storage.configuration import did_you_mean

GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """`link`: bytes/s between accelerators of a machine, in one direction; `network`: of a machine to the others."""

    name: str
    memory_bytes: int
    bf16_flops: float
    fp32_flops: float
    memory_bandwidth: float
    link: float
    network: float
    note: str  # where the numbers are from
    is_cpu: bool = False


# Network: one 400 Gb/s adapter (100: workstations) a machine is assumed; a site's own is likely to differ.
_TABLE = (
    Accelerator(
        "h200", 143_771 * 2**20, 989e12, 67e12, 4.8e12, 450e9, 50e9,
        "NVIDIA H200 SXM data sheet, memory as nvidia-smi shows it; NVLink 4",
    ),
    Accelerator("h100", 80 * GIB, 989e12, 67e12, 3.35e12, 450e9, 50e9, "NVIDIA H100 SXM data sheet; NVLink 4"),
    Accelerator("a100-80gb", 80 * GIB, 312e12, 19.5e12, 2.04e12, 300e9, 25e9, "NVIDIA A100 SXM data sheet; NVLink 3"),
    Accelerator("a100-40gb", 40 * GIB, 312e12, 19.5e12, 1.56e12, 300e9, 25e9, "NVIDIA A100 SXM data sheet; NVLink 3"),
    Accelerator("l40s", 48 * GB, 362e12, 91.6e12, 0.86e12, 32e9, 25e9, "NVIDIA L40S data sheet; PCIe 4 x16"),
    Accelerator("rtx-4090", 24 * GB, 165e12, 82.6e12, 1.01e12, 32e9, 12.5e9, "NVIDIA Ada whitepaper; PCIe 4 x16"),
    Accelerator(
        "v100", 32 * GIB, 15.7e12, 15.7e12, 0.9e12, 150e9, 12.5e9,
        "NVIDIA V100 SXM2 data sheet; no bf16 units: counted at the fp32 rate",
    ),
)  # fmt: skip
_SAME = {"a100": "a100-80gb", "4090": "rtx-4090", "rtx4090": "rtx-4090", "h100-80gb": "h100"}


def names() -> list[str]:
    return [*(accelerator.name for accelerator in _TABLE), "cpu"]


def find(name: str, per_machine: int) -> Accelerator:
    """An accelerator by name, or what this machine has (`auto`). Raises UserError for a name that is not known."""
    wanted = name.lower().replace("_", "-")
    if wanted == "auto":
        wanted = _here()
    wanted = _SAME.get(wanted, wanted)
    if wanted == "cpu":
        return _cpu(per_machine)
    for accelerator in _TABLE:
        if accelerator.name == wanted:
            return accelerator
    raise UserError(f"gpu is {name!r}; choose one of {', '.join(names())}{did_you_mean(wanted, names())}")


def host_memory_bytes() -> int:
    """Memory of this machine, or of the part of it we may use (control group)."""
    limit, _ = malloc.control_group_bytes()
    return int(min(psutil.virtual_memory().total, limit))


def _here() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    found = torch.cuda.get_device_name().lower()
    memory = torch.cuda.get_device_properties(0).total_memory
    if "a100" in found:
        return "a100-80gb" if memory > 60 * GB else "a100-40gb"
    for accelerator in _TABLE:
        if accelerator.name.removeprefix("rtx-") in found:
            return accelerator.name
    raise UserError(
        f"this machine's {found} is not in the table; choose one of {', '.join(names())} with --gpu"
    )


def _cpu(processes: int) -> Accelerator:
    """A share of this machine. Its rates are a guess; `--calibrate` and the measured table replace it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1.0, cores / processes)
    note = "this machine's memory and cores; 50 GFLOP/s a core (fp32, AVX2 at 3 GHz: 96 at the very most)"
    memory = host_memory_bytes() // processes
    return Accelerator("cpu", memory, 50e9 * share, 50e9 * share, 10e9, 2e9, 1e9, note, is_cpu=True)
