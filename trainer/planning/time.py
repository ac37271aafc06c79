"""Estimate the seconds of an optimizer step from FLOPs and FLOP/s, and from bytes and bandwidths."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import UserError
from trainer.models import load
from trainer.planning.accelerators import Accelerator, Hardware
from trainer.planning.measurements import read_measurements
from trainer.planning.workload import Workload
from trainer.storage.json_lines import read_json_lines
from trainer.storage.run_directory import RunDirectory
from trainer.training import ds_config
from trainer.training.throughput import flops_per_token

# (number of parameters, model FLOPs utilisation). The values were not measured here but taken from llm-foundry's table, for
# H100s with short sequences and sharding like ZeRO-3. The value for 100M parameters is assumed.
_MFU = ((100e6, 0.25), (760e6, 0.404), (1e9, 0.432), (3e9, 0.463), (7e9, 0.464))
_LINK_EFFICIENCY = 0.8  # assumed: fraction of the nominal bandwidth that is reached
_PCIE_BANDWIDTH = 25e9  # assumed: bytes/s between a GPU and host memory over PCIe 4 x16, for offloading
_HOST_ADAM_BANDWIDTH = 100e9  # assumed: bytes/s that DeepSpeed's CPU AdamW reads and writes, per host
_ADAM_BYTES = 28  # bytes per element: AdamW reads gradient, master weight and two moments, and writes all but the gradient


@dataclass(frozen=True)
class Rate:
    """FLOP/s of one rank in the forward and backward pass, and the source of the number."""

    flops: float
    source: str


@dataclass(frozen=True)
class StepTime:
    compute_seconds: float
    communication_seconds: float
    update_seconds: float
    is_overlapped: bool  # True: computation and communication run at the same time
    rate: Rate
    is_extrapolated: bool  # True: the plan has several machines, but all measurements are from one machine

    @property
    def seconds(self) -> float:
        both = (self.compute_seconds, self.communication_seconds)
        return (max(both) if self.is_overlapped else sum(both)) + self.update_seconds


def default_flops_rate(num_parameters: int, bf16: bool, accelerator: Accelerator) -> Rate:
    """Return a rank's rate without `--calibrate`: measured for a CPU, peak * MFU for a known GPU, infinite for others."""
    peak = accelerator.bf16_flops if bf16 else accelerator.fp32_flops
    own = "--calibrate RUN for your own"
    if accelerator.is_cpu:
        measured = read_measurements()
        source = f"{measured['hardware']}, {measured['date']}; --calibrate RUN takes this machine's speed"
        return Rate(measured["cpu_flops_per_rank"] or peak, source)
    if not accelerator.is_speed_known:
        return Rate(peak, f"unknown: {accelerator.name} is not in the table of GPUs; {own}")
    sizes, utilisations = zip(*_MFU, strict=True)
    mfu = float(np.interp(num_parameters, sizes, utilisations))
    return Rate(peak * mfu, f"{mfu:.0%} of peak (llm-foundry's H100 table, cited); {own}")


def measured_flops_rate(run_path: str, mean_length: float) -> Rate:
    """Return a rank's measured rate in a run. Raises UserError if `run_path` is no run or has fewer than two logged steps."""
    run = RunDirectory(Path(run_path))
    try:
        facts = json.loads(run.environment.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"calibrate: {run_path} is not a run directory: {error}") from None
    records = (record for _, record in read_json_lines(run.metrics) if record)
    steps = [record for record in records if "tokens_per_second" in record]
    if len(steps) < 2:
        raise UserError(f"calibrate: {run.metrics} has {len(steps)} step(s); at least 2 are needed")
    # The first step is left out: it allocates memory and warms up kernels.
    speed = statistics.median(step["tokens_per_second"] for step in steps[1:])
    config = load.load_config(str(run.model))
    flops = flops_per_token(facts["num_parameters"], config, mean_length)
    source = f"measured: {run_path}, {speed:,.0f} tokens/s on {facts['world_size']} rank(s)"
    return Rate(speed * flops / facts["world_size"], source)


def estimate_step_time(
    workload: Workload, deepspeed_config: dict[str, Any], hardware: Hardware, checkpointing: bool, rate: Rate
) -> StepTime:
    """Return the time of one optimizer step. With `checkpointing`, the forward pass runs twice (a third more FLOPs)."""
    accelerator, per_node, world_size = hardware.accelerator, hardware.gpus_per_node, hardware.world_size
    stage = ds_config.zero_stage(deepspeed_config)
    element_bytes = 2 if deepspeed_config["bf16"]["enabled"] else 4
    flops = flops_per_token(workload.num_parameters, workload.config, workload.mean_length)
    recompute = 4 / 3 if checkpointing else 1.0
    compute = workload.tokens_per_step / world_size * flops * recompute / rate.flops

    volumes = communication_volumes(stage, int(deepspeed_config["gradient_accumulation_steps"]))
    bandwidth = accelerator.link_bandwidth
    if hardware.num_nodes > 1:
        bandwidth = min(bandwidth, accelerator.network_bandwidth / per_node)
    moved = volumes * element_bytes * workload.num_parameters * (world_size - 1) / world_size
    communication = moved / (bandwidth * _LINK_EFFICIENCY)

    share = workload.num_parameters / (world_size if stage else 1)
    update = _ADAM_BYTES * share / accelerator.memory_bandwidth
    if ds_config.offloads_optimizer(deepspeed_config):
        update = 2 * element_bytes * share / _PCIE_BANDWIDTH
        update += _ADAM_BYTES * share * per_node / _HOST_ADAM_BANDWIDTH
    is_overlapped = bool(deepspeed_config["zero_optimization"].get("overlap_comm", stage == 3))
    return StepTime(compute, communication, update, is_overlapped, rate, hardware.num_nodes > 1)


def communication_volumes(stage: int, accumulation_steps: int) -> int:
    """Return the communication volume of a rank in a step, in units of the size of all parameters.

    A reduce-scatter or all-gather has volume 1, an all-reduce has volume 2. ZeRO stages 0 and 1 all-reduce the gradients
    once per step, stage 2 after every micro-batch. Stages 1 and 2 gather the weights once per step. Stage 3 gathers the
    weights twice per micro-batch and reduce-scatters the gradients. The volumes of stages 1 and 2 were measured.
    """
    return (2, 3, 2 * accumulation_steps + 1, 3 * accumulation_steps)[stage]
