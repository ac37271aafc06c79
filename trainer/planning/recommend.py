"""Choice of the ds_config that fits with the least communication, and of the largest micro-batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.planning import plan
from trainer.planning.activations import ActivationTrace, MemorySample, trace_activations
from trainer.planning.plan import Hardware, RunPlan
from trainer.planning.workload import estimate_workload
from trainer.settings import PlanSettings
from trainer.study.stages import to_flags

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
    divisors = {micro for micro in range(1, packs + 1) if packs % micro == 0}
    powers = {2**power for power in range(_MAX_MICRO_BATCH.bit_length())}
    plan_micro_batch = _planner_of_micro_batches(requested)
    for file in choices:
        for checkpointing in sorted({settings.gradient_checkpointing, True}):
            found, largest = None, 0
            for micro in sorted(divisors | powers):
                candidate = plan_micro_batch(str(file), checkpointing, micro, max(1, packs // micro))
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
    plan_only: dict[str, Any] = {
        field.name: field.default
        for field in dataclasses.fields(settings)
        if field.name in PlanSettings.__annotations__
    }
    flags = to_flags(dataclasses.replace(settings, **plan_only, dry_run=False))
    flags += [f"--{name}=..." for name in ("train_shards", "output_dir") if not getattr(settings, name)]
    if machine.nodes > 1:
        start = f"srun --nodes={machine.nodes} --ntasks-per-node={machine.per_node} python"
    else:
        start = f"deepspeed --num_gpus {machine.per_node}"
    return " \\\n    ".join([f"{start} tools/train.py", *flags])


def _planner_of_micro_batches(requested: RunPlan) -> Callable[[str, bool, int, int], RunPlan | None]:
    """Return a function of ds_config, recomputation, packs of a micro-batch and accumulation steps.

    It returns the plan, or None if the ds_config contradicts the settings.
    """
    settings, machine = requested.settings, requested.hardware
    cuda = not machine.accelerator.is_cpu
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    one_pack: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    single = dataclasses.replace(
        estimate_workload(dataclasses.replace(settings, **one_pack), machine.world_size),
        total_steps=requested.workload.total_steps,
    )

    @cache
    def trace_packs(checkpointing: bool, packs: int) -> ActivationTrace:
        lengths, learned_tokens = list(single.lengths * packs), max(1, single.num_target_tokens * packs)
        return trace_activations(single.config, lengths, learned_tokens, dtype, checkpointing, cuda)

    def plan_micro_batch(
        deepspeed: str, checkpointing: bool, micro: int, accumulation_steps: int
    ) -> RunPlan | None:
        values: dict[str, Any] = {
            "deepspeed": deepspeed,
            "gradient_checkpointing": checkpointing,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": accumulation_steps,
        }
        workload = dataclasses.replace(
            single,
            lengths=single.lengths * micro,
            num_target_tokens=single.num_target_tokens * micro,
            tokens_per_step=single.tokens_per_step * micro * accumulation_steps,
        )
        trace = _scale_trace(trace_packs(checkpointing, 1), trace_packs(checkpointing, 2), micro)
        changed = dataclasses.replace(settings, **values)
        try:  # logits are counted as activations
            return plan.plan_with_trace(changed, machine, workload, (trace, 0))
        except UserError:
            return None

    return plan_micro_batch


def _scale_trace(one: ActivationTrace, two: ActivationTrace, packs: int) -> ActivationTrace:
    """Extrapolate from the traces of one and two packs: every tensor is constant or linear in the tokens."""
    more = packs - 1
    samples = tuple(
        MemorySample(
            a.gradient_elements,
            a.bytes + (b.bytes - a.bytes) * more,
            a.bytes_at_start + (b.bytes_at_start - a.bytes_at_start) * more,
        )
        for a, b in zip(one.samples, two.samples, strict=True)
    )
    return ActivationTrace(samples, one.saved_bytes + (two.saved_bytes - one.saved_bytes) * more)


def _differences(requested: PlanSettings, found: PlanSettings) -> tuple[str, ...]:
    return tuple(
        f"--{field.name} {getattr(found, field.name)} (asked: {getattr(requested, field.name) or 'none'})"
        for field in dataclasses.fields(PlanSettings)
        if getattr(requested, field.name) != getattr(found, field.name)
    )
