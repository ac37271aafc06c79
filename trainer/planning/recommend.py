"""Recommend the ds_config with the least communication that fits in memory, and the largest micro-batch for it."""

import dataclasses
import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.planning.accelerators import Hardware
from trainer.planning.activations import ActivationTrace, MemorySample, trace_activations
from trainer.planning.plan import RunPlan, plan_with_trace
from trainer.planning.workload import estimate_workload
from trainer.settings import PlanSettings
from trainer.study.stages import to_flags

# In order of preference: more partitioning costs communication, offloading costs transfers to the host.
_FILES = ("zero1.json", "zero2.json", "zero3.json", "zero2_offload.json", "zero3_offload.json")
_FOLDERS = (Path("ds_configs"), Path(__file__).parents[2] / "ds_configs")
_MAX_MICRO_BATCH = 64


@dataclass(frozen=True)
class Recommendation:
    """Recommended plan, which fits in the memory of the hardware."""

    plan: RunPlan
    largest_micro_batch: int  # packs per forward pass; the largest number that was tried and fits in memory
    differences: tuple[str, ...]  # one text per flag that differs from the requested plan


def recommend(requested: RunPlan) -> Recommendation | None:
    """Return a recommended plan, or None if no plan fits in memory.

    The requested ds_config is kept if the requested plan fits in memory. Otherwise, the files in `_FILES` are tried in
    order. Activation checkpointing is added only if needed. A pack is a sequence of whole examples. The packs of a step are
    divided into equal micro-batches, which are as large as the memory allows.
    """
    settings, hardware = requested.settings, requested.hardware
    if settings.deepspeed and requested.memory_fits:
        files = [settings.deepspeed]
    else:
        folders = [Path(settings.deepspeed).parent] if settings.deepspeed else _FOLDERS
        folder = next((path for path in folders if path.is_dir()), Path())
        files = [str(folder / name) for name in _FILES if (folder / name).is_file()] or [settings.deepspeed]
    packs = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    divisors = {micro for micro in range(1, packs + 1) if packs % micro == 0}
    powers = {2**power for power in range(_MAX_MICRO_BATCH.bit_length())}
    one_pack: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    single = dataclasses.replace(
        estimate_workload(dataclasses.replace(settings, **one_pack), hardware.world_size),
        total_steps=requested.workload.total_steps,
    )

    @cache
    def trace_packs(checkpointing: bool, packs: int) -> ActivationTrace:
        lengths, num_targets = list(single.lengths * packs), max(1, single.num_target_tokens * packs)
        dtype, cuda = torch.bfloat16 if settings.bf16 else torch.float32, not hardware.accelerator.is_cpu
        return trace_activations(single.config, lengths, num_targets, dtype, checkpointing, cuda)

    for file, checkpointing in itertools.product(files, sorted({settings.gradient_checkpointing, True})):
        recommended, largest = None, 0
        for micro in sorted(divisors | powers):
            accumulation_steps = max(1, packs // micro)
            workload = dataclasses.replace(
                single,
                lengths=single.lengths * micro,
                num_target_tokens=single.num_target_tokens * micro,
                tokens_per_step=single.tokens_per_step * micro * accumulation_steps,
            )
            candidate = dataclasses.replace(
                settings,
                deepspeed=file,
                gradient_checkpointing=checkpointing,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=accumulation_steps,
            )
            trace = _scale_trace(trace_packs(checkpointing, 1), trace_packs(checkpointing, 2), micro)
            try:
                plan = plan_with_trace(candidate, hardware, workload, trace)
            except UserError:  # the ds_config contradicts the settings
                break
            if not plan.memory_fits:
                break
            largest = micro
            if packs % micro == 0:
                recommended = plan
        if recommended is not None:
            return Recommendation(recommended, largest, _differences(settings, recommended.settings))
    return None


def train_command(settings: PlanSettings, hardware: Hardware) -> str:
    """Return the command line of the planned training."""
    plan_only = {name: getattr(PlanSettings, name) for name in PlanSettings.__annotations__}  # the defaults
    flags = to_flags(dataclasses.replace(settings, **plan_only, dry_run=False))
    flags += [f"--{name}=..." for name in ("train_shards", "output_dir") if not getattr(settings, name)]
    if hardware.num_nodes > 1:
        start = f"srun --nodes={hardware.num_nodes} --ntasks-per-node={hardware.gpus_per_node} python"
    else:
        start = f"deepspeed --num_gpus {hardware.gpus_per_node}"
    return " \\\n    ".join([f"{start} tools/train.py", *flags])


def _scale_trace(one_pack: ActivationTrace, two_packs: ActivationTrace, packs: int) -> ActivationTrace:
    """Return the trace of `packs` packs, extrapolated linearly from one and two packs. Logits are counted as activations."""
    more = packs - 1
    samples = (
        MemorySample(
            a.gradient_elements,
            a.bytes + (b.bytes - a.bytes) * more,
            a.bytes_at_start + (b.bytes_at_start - a.bytes_at_start) * more,
        )
        for a, b in zip(one_pack.samples, two_packs.samples, strict=True)
    )
    return ActivationTrace(tuple(samples))


def _differences(requested: PlanSettings, recommended: PlanSettings) -> tuple[str, ...]:
    return tuple(
        f"--{name} {value} (asked: {getattr(requested, name) or 'none'})"
        for name, value in vars(recommended).items()
        if getattr(requested, name) != value
    )
