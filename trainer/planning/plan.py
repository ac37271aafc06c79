"""Plan of a training run: its memory, disk and time, and the reasons why it does not fit the hardware."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from trainer.planning import memory, time
from trainer.planning.accelerators import GB, Accelerator, find_accelerator, host_memory_bytes
from trainer.planning.activations import ActivationTrace
from trainer.planning.memory import MemoryEstimate
from trainer.planning.time import StepTime
from trainer.planning.workload import Workload, estimate_workload
from trainer.planning.zero_memory import ACTIVATIONS, LOGITS
from trainer.runtime.terminal import size_text
from trainer.settings import PlanSettings
from trainer.training import ds_config


@dataclass(frozen=True)
class Hardware:
    accelerator: Accelerator
    nodes: int
    per_node: int
    host_bytes: int  # of a machine; 0: not known
    disk_bytes: int  # 0: not known

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class DiskEstimate:
    """Bytes that a run writes to disk, of all ranks together."""

    checkpoint_bytes: int
    num_checkpoints: int  # those kept, and the one being written
    export_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.checkpoint_bytes * self.num_checkpoints + self.export_bytes


@dataclass(frozen=True)
class RunPlan:
    """Estimates for one run. `refusals`: reasons why it cannot run, with remedies; empty if it fits."""

    settings: PlanSettings
    hardware: Hardware
    workload: Workload
    resolved: dict[str, Any]  # resolved ds_config
    memory: MemoryEstimate
    disk: DiskEstimate
    step: StepTime
    refusals: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def stage(self) -> int:
        return ds_config.stage(self.resolved)

    @property
    def fits(self) -> bool:
        return not self.refusals

    @property
    def memory_fits(self) -> bool:
        """True if there is no refusal that another ds_config could remove."""
        return all(refusal.startswith("disk: ") for refusal in self.refusals)

    @property
    def is_speed_known(self) -> bool:
        return self.hardware.accelerator.is_speed_known or bool(self.settings.calibrate)

    @property
    def seconds(self) -> float:
        """Seconds of all steps; 0 if their number or the GPU's speed is not known."""
        return self.step.seconds * self.workload.total_steps if self.is_speed_known else 0.0

    @property
    def accelerator_hours(self) -> float:
        return self.seconds * self.hardware.world_size / 3600


def hardware(settings: PlanSettings) -> Hardware:
    """Return the hardware of the settings. Raises UserError for an unknown accelerator."""
    accelerator = find_accelerator(settings.gpu, settings.gpus_per_node)
    host = int(settings.host_memory_gb * GB)
    if accelerator.is_cpu or (not host and settings.gpu == "auto"):
        host = host or host_memory_bytes()
    if accelerator.is_cpu:
        accelerator = dataclasses.replace(accelerator, memory_bytes=host // settings.gpus_per_node)
    space = int(settings.disk_gb * GB)
    if not space and settings.output_dir:
        output = Path(settings.output_dir)
        folder = next((path for path in (output, *output.parents) if path.is_dir()), None)
        space = shutil.disk_usage(folder).free if folder else 0
    return Hardware(accelerator, settings.nodes, settings.gpus_per_node, host, space)


def make_plan(
    settings: PlanSettings, process_bytes: int | None = None, ignore_glibc_heap: bool = False
) -> RunPlan:
    """Plan one training.

    `process_bytes` replaces the measured memory of a process, and `ignore_glibc_heap` sets the memory that glibc's heap
    keeps to 0. Raises UserError for an unknown model, file or accelerator and for contradictory settings.
    """
    machine = hardware(settings)
    workload = estimate_workload(settings, machine.world_size)
    traced = memory.trace_phases(
        workload, settings.bf16, settings.gradient_checkpointing, cuda=not machine.accelerator.is_cpu
    )
    return plan_with_trace(settings, machine, workload, traced, process_bytes, ignore_glibc_heap)


def plan_with_trace(
    settings: PlanSettings,
    machine: Hardware,
    workload: Workload,
    traced: tuple[ActivationTrace, int],
    process_bytes: int | None = None,
    ignore_glibc_heap: bool = False,
) -> RunPlan:
    """Plan one training whose activations were traced already (`memory.trace_phases`)."""
    accelerator = machine.accelerator
    resolved = ds_config.resolve_ds_config(settings, machine.world_size)
    measured = read_measurements()
    if process_bytes is None:  # stages import different parts of DeepSpeed
        by_stage = measured["process_bytes"]
        process_bytes = int(by_stage.get(str(ds_config.stage(resolved)), max(by_stage.values())))
    returns_memory = ignore_glibc_heap or "MALLOC_MMAP_THRESHOLD_" in os.environ
    kept = 0.0 if returns_memory else measured["kept_by_glibc"]
    ranks, nodes = machine.world_size, machine.nodes
    needed = memory.estimate_memory(workload, resolved, accelerator, ranks, traced, process_bytes, kept)
    space = estimate_disk(workload, resolved, settings.save_total_limit)
    if settings.calibrate:
        rate = time.measured_rate(settings.calibrate, workload.mean_length)
    else:
        rate = time.default_rate(workload.num_parameters, settings.bf16, accelerator, measured)
    checkpointing = settings.gradient_checkpointing
    step = time.estimate_step_time(
        workload, resolved, accelerator, nodes, machine.per_node, checkpointing, rate
    )
    notes = list(workload.assumptions)
    if step.is_extrapolated:
        notes.append("several machines: extrapolated from measurements on one machine")
    if not accelerator.is_cpu:
        notes.append("GPU memory, CUDA context and fragmentation: computed, not measured on a GPU")
    if not accelerator.is_speed_known:
        notes.append(
            f"{accelerator.name}: {accelerator.note}; --calibrate RUN takes the speed of a finished run"
        )
    if settings.bf16 and accelerator.name.startswith("v100"):
        notes.append("a V100 has no bf16 units: bf16 runs at the rate of fp32")
    refusals = _refusals(machine, needed, space)
    return RunPlan(settings, machine, workload, resolved, needed, space, step, refusals, tuple(notes))


def estimate_disk(workload: Workload, resolved: dict[str, Any], save_total_limit: int) -> DiskEstimate:
    """Return the bytes of all ranks together, without the kilobytes of names and shapes.

    Stage 0 writes weights and AdamW's two fp32 moments; stages 1 and 2 weights, fp32 masters and moments; stage 3
    masters and moments.
    """
    element_bytes = 2 if resolved["bf16"]["enabled"] else 4
    per_parameter = (element_bytes + 8, element_bytes + 12, element_bytes + 12, 12)[ds_config.stage(resolved)]
    export = element_bytes * workload.num_parameters
    return DiskEstimate(per_parameter * workload.num_parameters, save_total_limit + 1, export)


def _refusals(machine: Hardware, needed: MemoryEstimate, space: DiskEstimate) -> tuple[str, ...]:
    found = []
    limit = machine.accelerator.memory_bytes
    unit = "process" if machine.accelerator.is_cpu else "GPU"
    if needed.device_bytes > limit:
        missing = needed.device_bytes - limit
        within_batch = needed.device[ACTIVATIONS] + needed.device[LOGITS]
        if within_batch > missing:
            remedy = (
                "smaller per_device_train_batch_size or pack_length, or --gradient_checkpointing: "
                f"activations and logits take {size_text(within_batch)}"
            )
        else:
            remedy = (
                "divide more among ranks (ds_configs/zero3.json, more GPUs), offload "
                "(ds_configs/zero3_offload.json), or use a smaller model"
            )
        found.append(
            f"memory: a {unit} needs {size_text(needed.device_bytes)} and has {size_text(limit)}, "
            f"{size_text(missing)} are missing; {remedy}"
        )
    host = needed.host_bytes * machine.per_node
    if machine.host_bytes and host > machine.host_bytes:
        found.append(
            f"host memory: {machine.per_node} rank(s) of a machine need {size_text(host)} and it has "
            f"{size_text(machine.host_bytes)}, {size_text(host - machine.host_bytes)} are missing; "
            "use more machines, or a ds_config without offload"
        )
    if machine.disk_bytes and space.total_bytes > machine.disk_bytes:
        found.append(
            f"disk: checkpoints and export need {size_text(space.total_bytes)}, {size_text(machine.disk_bytes)} are free, "
            f"{size_text(space.total_bytes - machine.disk_bytes)} are missing; lower save_total_limit, or another output_dir"
        )
    return tuple(found)


@lru_cache
def read_measurements() -> dict[str, Any]:
    """Return measured.json, written by benchmarks/plan_accuracy.py: hardware, date, errors of all cases, rates."""
    text = files("trainer.planning").joinpath("measured.json").read_text(encoding="utf-8")
    return json.loads(text)
