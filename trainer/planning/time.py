"""Seconds of an optimizer step: arithmetic over an attained rate, and bytes over bandwidths."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.models import load
from trainer.planning.accelerators import Accelerator
from trainer.planning.workload import Workload
from trainer.storage.run_directory import RunDirectory
from trainer.training.throughput import flops_per_token

# Part of the peak that is reached: llm-foundry's table for H100s, short sequences, ZeRO-3-like (cited, not measured
# here), by parameters. Below its smallest model a straight line to 25 % at 100M is assumed.
_MFU = ((100e6, 0.25), (760e6, 0.404), (1e9, 0.432), (3e9, 0.463), (7e9, 0.464))
_BANDWIDTH_USED = 0.8  # of a link's nominal rate: assumed
_PCIE = 25e9  # bytes/s to host memory, for offloading: PCIe 4 x16 in practice, assumed
_HOST_ADAM = 100e9  # bytes/s of a host's memory under DeepSpeed's CPU AdamW: assumed
_ADAM_BYTES = 28  # an element: read gradient, master and two moments, write master, moments


@dataclass(frozen=True)
class Rate:
    """FLOP/s of one rank in forward and backward, and where the number is from."""

    flops: float
    source: str


@dataclass(frozen=True)
class StepTime:
    compute_seconds: float
    communication_seconds: float
    update_seconds: float
    overlapped: bool
    rate: Rate
    extrapolated: bool  # more than one machine: nothing here was measured on several

    @property
    def seconds(self) -> float:
        both = (self.compute_seconds, self.communication_seconds)
        return (max(both) if self.overlapped else sum(both)) + self.update_seconds


def default_rate(num_parameters: int, bf16: bool, accelerator: Accelerator, measured: dict[str, Any]) -> Rate:
    """What is reached of the peak if no run of one's own was measured; `measured`: measured.json."""
    peak = accelerator.bf16_flops if bf16 else accelerator.fp32_flops
    if accelerator.is_cpu:
        source = (
            f"{measured['hardware']}, {measured['date']}; --calibrate RUN takes the speed of this machine"
        )
        return Rate(measured["cpu_flops_per_rank"] or peak, source)
    if not accelerator.is_speed_known:
        return Rate(
            peak, f"unknown: {accelerator.name} is not in the table of GPUs; --calibrate RUN for your own"
        )
    part = _interpolate(num_parameters)
    return Rate(
        peak * part, f"{part:.0%} of peak (llm-foundry's H100 table, cited); --calibrate RUN for your own"
    )


def measured_rate(run_path: str, mean_length: float) -> Rate:
    """FLOP/s a rank reached in a finished run, communication and update included. Raises UserError."""
    run = RunDirectory(Path(run_path))
    try:
        facts = json.loads(run.environment.read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"calibrate: {run_path} is not a run directory with metrics: {error}") from None
    steps = [line for line in lines if "tokens_per_second" in line]
    if len(steps) < 2:
        raise UserError(f"calibrate: {run.metrics} has {len(steps)} step(s); at least 2 are needed")
    # The first step allocates and warms up.
    speed = statistics.median(line["tokens_per_second"] for line in steps[1:])
    config = load.load_config(str(run.model))
    flops = flops_per_token(facts["num_parameters"], config, mean_length)
    source = f"measured: {run_path}, {speed:,.0f} tokens/s on {facts['world_size']} rank(s)"
    return Rate(speed * flops / facts["world_size"], source)


def estimate_step_time(
    workload: Workload,
    resolved: dict[str, Any],
    accelerator: Accelerator,
    nodes: int,
    per_node: int,
    checkpointing: bool,
    rate: Rate,
) -> StepTime:
    """One optimizer step of a rank: 6N + attention FLOPs a token, 4/3 of it with recomputation."""
    world = nodes * per_node
    zero = resolved["zero_optimization"]
    stage = int(zero.get("stage", 0))
    element_bytes = 2 if resolved["bf16"]["enabled"] else 4
    flops = flops_per_token(workload.num_parameters, workload.config, workload.mean_length)
    recompute = 4 / 3 if checkpointing else 1.0
    compute = workload.tokens_per_step / world * flops * recompute / rate.flops

    volumes = communication_volumes(stage, int(resolved["gradient_accumulation_steps"]))
    bandwidth = accelerator.link if nodes == 1 else min(accelerator.link, accelerator.network / per_node)
    moved = volumes * element_bytes * workload.num_parameters * (world - 1) / world
    communication = moved / (bandwidth * _BANDWIDTH_USED)

    share = workload.num_parameters / (world if stage else 1)
    update = _ADAM_BYTES * share / accelerator.memory_bandwidth
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        update = 2 * element_bytes * share / _PCIE + _ADAM_BYTES * share * per_node / _HOST_ADAM
    overlapped = bool(zero.get("overlap_comm", stage == 3))
    return StepTime(compute, communication, update, overlapped, rate, nodes > 1)


def communication_volumes(stage: int, accumulation_steps: int) -> int:
    """How often a step moves a volume of all parameters; an all-reduce counts as two (reduce-scatter, all-gather).

    Measured for stages 1 and 2: ZeRO-2 reduces after every micro-batch, so with accumulation ZeRO-1 moves less.
    """
    return {
        0: 2,
        1: 3,
        2: 2 * accumulation_steps + 1,
        3: 3 * accumulation_steps,
    }[stage]


def _interpolate(num_parameters: float) -> float:
    if num_parameters <= _MFU[0][0]:
        return _MFU[0][1]
    for (low, low_part), (high, high_part) in itertools.pairwise(_MFU):
        if num_parameters <= high:
            return low_part + (high_part - low_part) * (num_parameters - low) / (high - low)
    return _MFU[-1][1]
