"""Of ds_configs/, the one that moves least data and fits, and the largest micro-batch that fits with it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.planning import plan, workload
from trainer.planning.activations import ActivationTrace, MemorySample, trace_activations
from trainer.planning.plan import Hardware, RunPlan
from trainer.planning.workload import Workload
from trainer.settings import PlanSettings

# In order of preference: what divides more communicates more, what offloads waits for the host.
_FILES = ("zero1.json", "zero2.json", "zero3.json", "zero2_offload.json", "zero3_offload.json")
_DEFAULT_FOLDER = Path("ds_configs")
_LARGEST_MICRO_BATCH = 64


@dataclass(frozen=True)
class Recommendation:
    """A plan whose memory fits; `largest_micro_batch` packs would fit a forward pass, if accumulation is to be changed."""

    plan: RunPlan
    largest_micro_batch: int  # at most 64 were tried
    differences: tuple[str, ...]  # flags that are not the asked ones


def recommend(asked: RunPlan) -> Recommendation | None:
    """The first of the files that fits, without recomputation if possible, with the same packs in a step.

    None if nothing does. Of micro-batches that give the same optimizer step the largest that fits is taken.
    """
    settings = asked.settings
    if settings.deepspeed and asked.memory_fits:
        choices = [Path(settings.deepspeed)]
    else:
        folder = Path(settings.deepspeed).parent if settings.deepspeed else _DEFAULT_FOLDER
        choices = [folder / name for name in _FILES if (folder / name).is_file()]
    packs = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    single = _of_one_pack(settings, asked)
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
                candidate = _plan(dataclasses.replace(settings, **values), asked.hardware, single)
                if candidate is None or not candidate.memory_fits:
                    break
                largest = micro
                if packs % micro == 0:
                    found = candidate
            if found is not None:
                return Recommendation(found, largest, _differences(settings, found.settings))
    return None


def command(settings: PlanSettings, world: Hardware) -> str:
    """The command line that trains what was planned."""
    wanted = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        own = field.name in _PLAN_ONLY
        if own or value == field.default or field.metadata.get("positional"):
            continue
        wanted.append(f"--{field.name}={str(value).lower() if isinstance(value, bool) else value}")
    for name in ("train_shards", "output_dir"):
        if not getattr(settings, name):
            wanted.append(f"--{name}=...")
    if world.nodes > 1:
        start = f"srun --nodes={world.nodes} --ntasks-per-node={world.per_node} python"
    else:
        start = f"deepspeed --num_gpus {world.per_node}"
    return " \\\n    ".join([f"{start} tools/train.py", *wanted])


_PLAN_ONLY = {
    field.name for field in dataclasses.fields(PlanSettings) if field.name in PlanSettings.__annotations__
} | {"dry_run"}


def _micro_batches(packs: int) -> list[int]:
    divisors = {micro for micro in range(1, packs + 1) if packs % micro == 0}
    powers = {2**power for power in range(_LARGEST_MICRO_BATCH.bit_length())}
    return sorted(divisors | powers)


def _plan(settings: PlanSettings, machine: Hardware, single: Workload) -> RunPlan | None:
    micro = settings.per_device_train_batch_size
    cuda = not machine.accelerator.is_cpu
    timeline = _scaled(_Key(single), settings.bf16, settings.gradient_checkpointing, cuda, micro)
    work = dataclasses.replace(
        single,
        lengths=single.lengths * micro,
        learned_tokens=single.learned_tokens * micro,
        tokens_per_step=single.tokens_per_step * micro * settings.gradient_accumulation_steps,
    )
    try:
        return plan.plan_on(settings, machine, work, timeline)
    except UserError:  # a file that contradicts the settings is no candidate
        return None


def _of_one_pack(settings: PlanSettings, asked: RunPlan) -> Workload:
    """What one pack computes; the steps of the run are those of the asked batch."""
    values: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    found = workload.estimate_workload(dataclasses.replace(settings, **values), asked.hardware.world_size)
    return dataclasses.replace(found, total_steps=asked.workload.total_steps)


class _Key:
    """A workload as a key of the cache: by identity."""

    def __init__(self, work: Workload) -> None:
        self.work = work

    def __hash__(self) -> int:
        return id(self.work)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.work is other.work


@lru_cache(maxsize=256)
def _traced(key: _Key, bf16: bool, checkpointing: bool, cuda: bool, micro: int) -> ActivationTrace:
    work = key.work
    dtype = torch.bfloat16 if bf16 else torch.float32
    return trace_activations(
        work.config,
        list(work.lengths * micro),
        max(1, work.learned_tokens * micro),
        dtype,
        checkpointing,
        cuda,
    )


def _scaled(
    key: _Key, bf16: bool, checkpointing: bool, cuda: bool, micro: int
) -> tuple[ActivationTrace, int]:
    """Activations of `micro` packs from those of one and two: every tensor grows linearly with tokens, or not at all.

    Logits are not told apart from other activations here.
    """
    one, two = (_traced(key, bf16, checkpointing, cuda, packs) for packs in (1, 2))
    more = micro - 1
    moments = tuple(
        MemorySample(
            a.gradient_elements,
            a.bytes + (b.bytes - a.bytes) * more,
            a.bytes_at_start + (b.bytes_at_start - a.bytes_at_start) * more,
        )
        for a, b in zip(one.samples, two.samples, strict=True)
    )
    return ActivationTrace(moments, one.saved_bytes + (two.saved_bytes - one.saved_bytes) * more), 0


def _differences(asked: PlanSettings, found: PlanSettings) -> tuple[str, ...]:
    return tuple(
        f"--{field.name} {getattr(found, field.name)} (asked: {getattr(asked, field.name) or 'none'})"
        for field in dataclasses.fields(PlanSettings)
        if getattr(asked, field.name) != getattr(found, field.name)
    )
