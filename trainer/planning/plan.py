"""Plan of a training run: memory, disk space, time, and any reasons why the run does not fit the hardware."""

import os
from dataclasses import dataclass
from typing import Any

from trainer.planning import memory, time
from trainer.planning.accelerators import Hardware, find_hardware
from trainer.planning.activations import ActivationTrace
from trainer.planning.measurements import read_measurements
from trainer.planning.memory import MemoryEstimate
from trainer.planning.time import StepTime
from trainer.planning.workload import Workload, estimate_workload
from trainer.planning.zero_memory import ACTIVATIONS, LOGITS
from trainer.runtime.terminal import size_text
from trainer.settings import PlanSettings
from trainer.training import ds_config


@dataclass(frozen=True)
class DiskEstimate:
    """Disk space of a run in bytes, for all ranks together."""

    checkpoint_bytes: int
    num_checkpoints: int  # save_total_limit + 1: the checkpoint that is being written counts too
    export_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.checkpoint_bytes * self.num_checkpoints + self.export_bytes


@dataclass(frozen=True)
class RunPlan:
    """Estimates for one run. `refusals`: reasons why the run does not fit the hardware; empty if the run fits."""

    settings: PlanSettings
    hardware: Hardware
    workload: Workload
    deepspeed_config: dict[str, Any]  # from `ds_config.resolve_ds_config`
    memory: MemoryEstimate
    disk: DiskEstimate
    step: StepTime
    refusals: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def stage(self) -> int:
        return ds_config.zero_stage(self.deepspeed_config)

    @property
    def fits(self) -> bool:
        return not self.refusals

    @property
    def memory_fits(self) -> bool:
        """True if no refusal is about memory. A ds_config is chosen by memory alone: it hardly changes the disk space."""
        return all(refusal.startswith("disk: ") for refusal in self.refusals)

    @property
    def is_speed_known(self) -> bool:
        return self.hardware.accelerator.is_speed_known or bool(self.settings.calibrate)

    @property
    def seconds(self) -> float:
        """Duration of all steps in seconds; 0 if the number of steps or the speed of the accelerator is not known."""
        return self.step.seconds * self.workload.total_steps if self.is_speed_known else 0.0

    @property
    def accelerator_hours(self) -> float:
        return self.seconds * self.hardware.world_size / 3600


def make_plan(
    settings: PlanSettings, process_bytes: int | None = None, ignore_glibc_heap: bool = False
) -> RunPlan:
    """Return the plan of one training run.

    `process_bytes`: memory of a rank with a tiny model; None: the value in measured.json. `ignore_glibc_heap`: if True, do
    not count freed blocks that glibc keeps in its heap. Raises UserError for an unknown model, file or accelerator, and for
    contradictory settings.
    """
    hardware = find_hardware(settings)
    workload = estimate_workload(settings, hardware.world_size)
    cuda = not hardware.accelerator.is_cpu
    trace = memory.trace_micro_batch(workload, settings.bf16, settings.gradient_checkpointing, cuda)
    return plan_with_trace(settings, hardware, workload, trace, process_bytes, ignore_glibc_heap)


def plan_with_trace(
    settings: PlanSettings,
    hardware: Hardware,
    workload: Workload,
    trace: ActivationTrace,
    process_bytes: int | None = None,
    ignore_glibc_heap: bool = False,
) -> RunPlan:
    """Return the plan of one training run (see `make_plan`). `trace`: activations of the micro-batch with the most tokens."""
    accelerator, measured = hardware.accelerator, read_measurements()
    config = ds_config.resolve_ds_config(settings, hardware.world_size)
    if process_bytes is None:  # by ZeRO stage: stages import different parts of DeepSpeed
        by_stage = measured["process_bytes"]
        process_bytes = int(by_stage.get(str(ds_config.zero_stage(config)), max(by_stage.values())))
    returns_memory = ignore_glibc_heap or "MALLOC_MMAP_THRESHOLD_" in os.environ
    kept_by_glibc = 0.0 if returns_memory else measured["kept_by_glibc"]
    needed = memory.estimate_memory(workload, config, hardware, trace, process_bytes, kept_by_glibc)
    disk = estimate_disk(workload, config, settings.save_total_limit)
    if settings.calibrate:
        rate = time.measured_flops_rate(settings.calibrate, workload.mean_length)
    else:
        rate = time.default_flops_rate(workload.num_parameters, settings.bf16, accelerator)
    step = time.estimate_step_time(workload, config, hardware, settings.gradient_checkpointing, rate)
    notes = list(workload.assumptions)
    if step.is_extrapolated:
        notes.append("several machines: extrapolated from measurements on one machine")
    if not accelerator.is_cpu:
        notes.append("GPU memory, CUDA context and fragmentation: computed, not measured on a GPU")
    if not accelerator.is_speed_known:
        notes.append(f"{accelerator.name}: {accelerator.note}; --calibrate RUN takes a finished run's speed")
    if settings.bf16 and accelerator.name.startswith("v100"):
        notes.append("a V100 has no bf16 units: bf16 runs at the rate of fp32")
    refusals = _refusals(hardware, needed, disk)
    return RunPlan(settings, hardware, workload, config, needed, disk, step, refusals, tuple(notes))


def estimate_disk(workload: Workload, config: dict[str, Any], save_total_limit: int) -> DiskEstimate:
    """Return the disk space of the checkpoints and the export, without metadata. `config`: the resolved ds_config.

    ZeRO stage 0 writes the weights and AdamW's two fp32 moments. Stages 1 and 2 write the weights, the fp32 master weights
    and the moments. Stage 3 writes the master weights and the moments.
    """
    element_bytes = 2 if config["bf16"]["enabled"] else 4
    by_stage = (element_bytes + 8, element_bytes + 12, element_bytes + 12, 12)
    per_parameter = by_stage[ds_config.zero_stage(config)]
    export = element_bytes * workload.num_parameters
    return DiskEstimate(per_parameter * workload.num_parameters, save_total_limit + 1, export)


def _refusals(hardware: Hardware, needed: MemoryEstimate, disk: DiskEstimate) -> tuple[str, ...]:
    refusals = []
    limit = hardware.accelerator.memory_bytes
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
        refusals.append(
            f"memory: a {hardware.unit} needs {size_text(needed.device_bytes)} and has {size_text(limit)}, "
            f"{size_text(missing)} are missing; {remedy}"
        )
    host = needed.host_bytes * hardware.gpus_per_node
    if hardware.host_bytes and host > hardware.host_bytes:
        refusals.append(
            f"host memory: {hardware.gpus_per_node} rank(s) of a machine need {size_text(host)} and it has "
            f"{size_text(hardware.host_bytes)}, {size_text(host - hardware.host_bytes)} are missing; "
            "use more machines, or a ds_config without offload"
        )
    if hardware.disk_bytes and disk.total_bytes > hardware.disk_bytes:
        refusals.append(
            f"disk: checkpoints and export need {size_text(disk.total_bytes)}, {size_text(hardware.disk_bytes)} are free, "
            f"{size_text(disk.total_bytes - hardware.disk_bytes)} are missing; lower save_total_limit, or another output_dir"
        )
    return tuple(refusals)
