"""Choice of the ds_config that fits with the least communication, and of the largest micro-batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.planning import plan
from trainer.planning.activations import ActivationTrace, MemorySample, trace_activations
from trainer.planning.plan import Hardware, RunPlan
from trainer.planning.workload import Workload, estimate_workload
from trainer.settings import PlanSettings

# In order of preference: more partitioning costs communication, offloading costs transfers to the host.
_FILES = ("zero1.json", "zero2.json", "zero3.json", "zero2_offload.json", "zero3_offload.json")
_DEFAULT_FOLDER = Path("ds_configs")
_MAX_MICRO_BATCH = 64


@dataclass(frozen=True)
class Recommendation:
    """A plan whose memory fits.

    `largest_micro_batch`: packs that fit in one forward pass, if accumulation may change; at most 64 are tried.
    `differences`: flags that differ from the requested ones.
    """

    plan: RunPlan
    largest_micro_batch: int
    differences: tuple[str, ...]


def recommend(requested: RunPlan) -> Recommendation | None:
    """Return the first ds_config that fits, without recomputation if possible, or None.

    The optimizer step keeps its packs, in the largest micro-batch that fits.
    """
    settings = requested.settings
    if settings.deepspeed and requested.memory_fits:
        choices = [Path(settings.deepspeed)]
    else:
        folder = Path(settings.deepspeed).parent if settings.deepspeed else _DEFAULT_FOLDER
        choices = [folder / name for name in _FILES if (folder / name).is_file()]
    packs = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    single = _single_pack_workload(settings, requested)
    for file in choices:
        for checkpointing in sorted({settings.gradient_checkpointing, True}):
            found = None
            largest = 0
            for micro in _micro_batches(packs):
                values: dict[str, Any] = {
                    "deepspeed": str(file),
                    "gradient_checkpointing": checkpointing,
                    "per_device_train_batch_size": micro,
                    "gradient_accumulation_steps": max(1, packs // micro),
                }
                candidate = _plan_micro_batch(
                    dataclasses.replace(settings, **values), requested.hardware, single
                )
                if candidate is None or not candidate.memory_fits:
                    break
                largest = micro
                if packs % micro == 0:
                    found = candidate
            if found is not None:
                return Recommendation(found, largest, _differences(settings, found.settings))
    return None


def train_command(settings: PlanSettings, machine: Hardware) -> str:
    """Return the command line of the planned training."""
    flags = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in _PLAN_ONLY or value == field.default or field.metadata.get("positional"):
            continue
        flags.append(f"--{field.name}={str(value).lower() if isinstance(value, bool) else value}")
    for name in ("train_shards", "output_dir"):
        if not getattr(settings, name):
            flags.append(f"--{name}=...")
    if machine.nodes > 1:
        start = f"srun --nodes={machine.nodes} --ntasks-per-node={machine.per_node} python"
    else:
        start = f"deepspeed --num_gpus {machine.per_node}"
    return " \\\n    ".join([f"{start} tools/train.py", *flags])


_PLAN_ONLY = {
    field.name for field in dataclasses.fields(PlanSettings) if field.name in PlanSettings.__annotations__
} | {"dry_run"}


def _micro_batches(packs: int) -> list[int]:
    divisors = {micro for micro in range(1, packs + 1) if packs % micro == 0}
    powers = {2**power for power in range(_MAX_MICRO_BATCH.bit_length())}
    return sorted(divisors | powers)


def _plan_micro_batch(settings: PlanSettings, machine: Hardware, single: Workload) -> RunPlan | None:
    """Return the plan from the workload of one pack, or None if the ds_config contradicts the settings."""
    micro = settings.per_device_train_batch_size
    cuda = not machine.accelerator.is_cpu
    traced = _scale_trace(_ByIdentity(single), settings.bf16, settings.gradient_checkpointing, cuda, micro)
    workload = dataclasses.replace(
        single,
        lengths=single.lengths * micro,
        num_target_tokens=single.num_target_tokens * micro,
        tokens_per_step=single.tokens_per_step * micro * settings.gradient_accumulation_steps,
    )
    try:
        return plan.plan_with_trace(settings, machine, workload, traced)
    except UserError:
        return None


def _single_pack_workload(settings: PlanSettings, requested: RunPlan) -> Workload:
    """Return the workload of a micro-batch of one pack, with the steps of the requested run."""
    values: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    found = estimate_workload(dataclasses.replace(settings, **values), requested.hardware.world_size)
    return dataclasses.replace(found, total_steps=requested.workload.total_steps)


class _ByIdentity:
    """Cache key of a workload, compared by identity."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def __hash__(self) -> int:
        return id(self.workload)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.workload is other.workload


@lru_cache(maxsize=256)
def _trace_packs(
    key: _ByIdentity, bf16: bool, checkpointing: bool, cuda: bool, packs: int
) -> ActivationTrace:
    workload = key.workload
    dtype = torch.bfloat16 if bf16 else torch.float32
    return trace_activations(
        workload.config,
        list(workload.lengths * packs),
        max(1, workload.num_target_tokens * packs),
        dtype,
        checkpointing,
        cuda,
    )


def _scale_trace(
    key: _ByIdentity, bf16: bool, checkpointing: bool, cuda: bool, micro: int
) -> tuple[ActivationTrace, int]:
    """Extrapolate the trace of `micro` packs from one and two: every tensor is constant or linear in the tokens.

    Logits are counted as activations.
    """
    one, two = (_trace_packs(key, bf16, checkpointing, cuda, packs) for packs in (1, 2))
    more = micro - 1
    samples = tuple(
        MemorySample(
            a.gradient_elements,
            a.bytes + (b.bytes - a.bytes) * more,
            a.bytes_at_start + (b.bytes_at_start - a.bytes_at_start) * more,
        )
        for a, b in zip(one.samples, two.samples, strict=True)
    )
    return ActivationTrace(samples, one.saved_bytes + (two.saved_bytes - one.saved_bytes) * more), 0


def _differences(requested: PlanSettings, found: PlanSettings) -> tuple[str, ...]:
    return tuple(
        f"--{field.name} {getattr(found, field.name)} (asked: {getattr(requested, field.name) or 'none'})"
        for field in dataclasses.fields(PlanSettings)
        if getattr(requested, field.name) != getattr(found, field.name)
    )
