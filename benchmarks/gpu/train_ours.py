"""Train with this trainer: python -m benchmarks.gpu.train_ours SHAPE STAGE PACKS ACCUMULATION CHECKPOINTING [--tiny]

Plans the case, then runs warm-up steps and timed steps. The last line on stdout is JSON; a case that the plan refuses is
not run.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import cases, materials
from benchmarks.harness import REPOSITORY
from trainer.runtime import distributed
from trainer.runtime.stop_request import StopRequest
from trainer.settings import PlanSettings, TrainSettings
from trainer.storage.run_directory import RunDirectory


def main() -> None:
    case = cases.parse(sys.argv[1:])
    values = settings_of(case)
    planned = plan(values)
    if not planned["fits"]:
        print(json.dumps({**planned, "tokens_per_second": 0.0, "memory_error_percent": 0.0}))
        return
    world = distributed.initialize(600)
    with tempfile.TemporaryDirectory() as folder:
        measured = train(TrainSettings(**values, output_dir=folder), world, case.tiny)
    distributed.shutdown()
    error = 100 * (planned["predicted_bytes"] / measured["peak_bytes"] - 1)
    print(json.dumps({**planned, **measured, "memory_error_percent": error}))


def settings_of(case: cases.Case) -> dict[str, Any]:
    return {
        "train_shards": str(materials.shards(case.tiny).path),
        "model_name_or_path": str(materials.model(case.shape, case.tiny)),
        "method": cases.METHOD,
        "deepspeed": str(REPOSITORY / "ds_configs" / f"zero{case.stage}.json"),
        "per_device_train_batch_size": case.packs,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_checkpointing": case.checkpointing,
        "pack_length": case.pack_length,
        "bf16": True,
        "max_steps": cases.WARM_UP + cases.TIMED,
        "learning_rate": 1e-5,
    }


def plan(values: dict[str, Any]) -> dict[str, Any]:
    """Plan for this machine; leave out context and fragmentation, which torch does not count."""
    from trainer.planning import memory
    from trainer.planning import plan as planning

    made = planning.make_plan(PlanSettings(**values, gpu="auto", gpus_per_node=1))
    beside = made.memory.device[memory.CONTEXT] + made.memory.device[memory.FRAGMENTATION]
    counted = made.memory.device_bytes - beside
    refused = [refusal for refusal in made.refusals if not refusal.startswith("disk: ")]
    return {"fits": not refused, "refused": "; ".join(refused), "predicted_bytes": counted}


def train(settings: TrainSettings, world: distributed.DistributedEnvironment, tiny: bool) -> dict[str, Any]:
    """Run the steps of the real loop, without its checkpoint."""
    from trainer.training import throughput
    from trainer.training.loop import optimizer_step
    from trainer.training.setup import setup_training

    stop = StopRequest()
    state = setup_training(settings, world, RunDirectory(Path(settings.output_dir)), stop)
    assert state is not None
    metrics, ends = [], []
    for step in range(settings.max_steps):
        metrics.append(optimizer_step(state, step, stop)[0])
        finish()
        ends.append(time.perf_counter())
    timed = metrics[cases.WARM_UP :]
    seconds = ends[-1] - ends[cases.WARM_UP - 1]
    tokens, learned = (sum(line[key] for line in timed) for key in ("tokens", "learned_tokens"))
    everything = sum(line["learned_tokens"] for line in metrics)
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": statistics.median(b - a for a, b in itertools.pairwise(ends)),
        "mfu": statistics.median(line["mfu"] for line in timed) if throughput.peak_flops() else None,
        "flops_per_token": flops_per_token(state, learned / tokens),
        "loss": sum(line["loss"] * line["learned_tokens"] for line in metrics) / everything,
        "tokens": tokens,
        "peak_bytes": throughput.peak_memory_bytes(),
        "reserved_bytes": reserved_bytes(),
    }


def flops_per_token(state: Any, learned_part: float) -> float:
    from trainer.training import throughput

    mean_length = state.data.tokens_per_epoch / state.data.num_examples
    return throughput.flops_per_token(state.facts["num_parameters"], state.config, mean_length, learned_part)


def finish() -> None:
    """Wait for the device: kernels run asynchronously."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reserved_bytes() -> int:
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


if __name__ == "__main__":
    main()
