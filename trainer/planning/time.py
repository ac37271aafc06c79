"""Estimate of the seconds of an optimizer step: FLOPs over an attained rate, bytes over bandwidths."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import UserError
from trainer.models import load
from trainer.planning.accelerators import Accelerator
from trainer.planning.workload import Workload
from trainer.storage.json_lines import read_json_lines
from trainer.storage.run_directory import RunDirectory
from trainer.training import ds_config
from trainer.training.throughput import flops_per_token

# MFU by parameters: llm-foundry's table for H100s, short sequences, ZeRO-3-like (cited, not measured here). Below its
# smallest model a straight line to 25 % at 100M is assumed.
_MFU = ((100e6, 0.25), (760e6, 0.404), (1e9, 0.432), (3e9, 0.463), (7e9, 0.464))
_LINK_EFFICIENCY = 0.8  # of the nominal rate: assumed
_PCIE_BANDWIDTH = 25e9  # bytes/s to host memory, for offloading: PCIe 4 x16 in practice, assumed
_HOST_ADAM_BANDWIDTH = 100e9  # bytes/s of a host's memory under DeepSpeed's CPU AdamW: assumed
_ADAM_BYTES = 28  # per element: read gradient, master and two moments, write master and moments


@dataclass(frozen=True)
class Rate:
    """FLOP/s of one rank in forward and backward, and the source of the number."""

    flops: float
    source: str


@dataclass(frozen=True)
class StepTime:
    compute_seconds: float
    communication_seconds: float
    update_seconds: float
    is_overlapped: bool
    rate: Rate
    is_extrapolated: bool  # more than one machine: measurements are of one

    @property
    def seconds(self) -> float:
        both = (self.compute_seconds, self.communication_seconds)
        return (max(both) if self.is_overlapped else sum(both)) + self.update_seconds


def default_rate(num_parameters: int, bf16: bool, accelerator: Accelerator, measured: dict[str, Any]) -> Rate:
    """Return the estimated rate without `--calibrate`. `measured`: the content of measured.json."""
    peak = accelerator.bf16_flops if bf16 else accelerator.fp32_flops
    own = "--calibrate RUN for your own"
    if accelerator.is_cpu:
        source = f"{measured['hardware']}, {measured['date']}"
        return Rate(
            measured["cpu_flops_per_rank"] or peak,
            f"{source}; --calibrate RUN takes the speed of this machine",
        )
    if not accelerator.is_speed_known:
        return Rate(peak, f"unknown: {accelerator.name} is not in the table of GPUs; {own}")
    sizes, utilisations = zip(*_MFU, strict=True)
    part = float(np.interp(num_parameters, sizes, utilisations))
    return Rate(peak * part, f"{part:.0%} of peak (llm-foundry's H100 table, cited); {own}")


def measured_rate(run_path: str, mean_length: float) -> Rate:
    """Return the FLOP/s per rank of a finished run, communication and update included. Raises UserError."""
    run = RunDirectory(Path(run_path))
    try:
        facts = json.loads(run.environment.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"calibrate: {run_path} is not a run directory: {error}") from None
    records = (record for _, record in read_json_lines(run.metrics) if record)
    steps = [record for record in records if "tokens_per_second" in record]
    if len(steps) < 2:
        raise UserError(f"calibrate: {run.metrics} has {len(steps)} step(s); at least 2 are needed")
    # The first step allocates and warms up.
    speed = statistics.median(step["tokens_per_second"] for step in steps[1:])
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
    """Return the time of one optimizer step: 6N + attention FLOPs per token, 4/3 of them with recomputation."""
    world_size = nodes * per_node
    stage = ds_config.stage(resolved)
    element_bytes = 2 if resolved["bf16"]["enabled"] else 4
    flops = flops_per_token(workload.num_parameters, workload.config, workload.mean_length)
    recompute = 4 / 3 if checkpointing else 1.0
    compute = workload.tokens_per_step / world_size * flops * recompute / rate.flops

    volumes = communication_volumes(stage, int(resolved["gradient_accumulation_steps"]))
    bandwidth = accelerator.link if nodes == 1 else min(accelerator.link, accelerator.network / per_node)
    moved = volumes * element_bytes * workload.num_parameters * (world_size - 1) / world_size
    communication = moved / (bandwidth * _LINK_EFFICIENCY)

    share = workload.num_parameters / (world_size if stage else 1)
    update = _ADAM_BYTES * share / accelerator.memory_bandwidth
    if ds_config.offloads(resolved):
        update = 2 * element_bytes * share / _PCIE_BANDWIDTH
        update += _ADAM_BYTES * share * per_node / _HOST_ADAM_BANDWIDTH
    is_overlapped = bool(resolved["zero_optimization"].get("overlap_comm", stage == 3))
    return StepTime(compute, communication, update, is_overlapped, rate, nodes > 1)


def communication_volumes(stage: int, accumulation_steps: int) -> int:
    """Return how many times a step moves all parameters; an all-reduce counts twice (reduce-scatter, all-gather).

    Measured for stages 1 and 2: ZeRO-2 reduces after every micro-batch, so ZeRO-1 moves less with accumulation.
    """
    return (2, 3, 2 * accumulation_steps + 1, 3 * accumulation_steps)[stage]
