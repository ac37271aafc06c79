"""Profile a training step: python -m benchmarks.gpu.profile_step SHAPE STAGE PACKS ACCUMULATION CHECKPOINTING [--tiny]

A case of cases.py, e.g. `gpt2-xl 1 16 4 0`. Prints times and MFU of five steps, then the kernels and CPU operations of one.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import cases, train_ours
from trainer.runtime import distributed
from trainer.runtime.stop_request import StopRequest
from trainer.settings import TrainSettings
from trainer.storage.run_directory import RunDirectory
from trainer.training.loop import optimizer_step
from trainer.training.setup import setup_training

STEPS, ROWS, CHARACTERS = 5, 25, 110


def main() -> None:
    case = cases.parse(sys.argv[1:])
    world, stop = distributed.initialize(600), StopRequest()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(**train_ours.settings_of(case), output_dir=folder)
        state = setup_training(settings, world, RunDirectory(Path(folder)), stop)
    metrics, ends = [], []
    for step in range(STEPS + 1):
        metrics.append(optimizer_step(state, step, stop)[0])
        train_ours.finish()
        ends.append(time.perf_counter())
    times = ", ".join(f"{1000 * (end - start):.0f}" for start, end in itertools.pairwise(ends))
    print(
        f"{case.name}: {times} ms a step, MFU {metrics[-1]['mfu'] or 0:.1%}, {metrics[-1]['memory_bytes'] / 1e9:.1f} GB"
    )
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        optimizer_step(state, STEPS + 1, stop)
        train_ours.finish()
    events = profiler.key_averages()
    for device, attribute in (("CUDA", "self_device_time_total"), ("CPU", "self_cpu_time_total")):
        show(device, attribute, [event for event in events if str(event.device_type).endswith(device)])
    distributed.shutdown()


def show(device: str, attribute: str, events: list[Any]) -> None:
    events.sort(key=lambda event: -getattr(event, attribute))
    total = sum(getattr(event, attribute) for event in events)
    print(f"{device}: {total / 1000:.1f} ms")
    for event in events[:ROWS]:
        microseconds = getattr(event, attribute)
        print(
            f"  {microseconds / total:6.1%} {microseconds / 1000:9.2f} ms {event.count:6d}  {event.key[:CHARACTERS]}"
        )


if __name__ == "__main__":
    main()
