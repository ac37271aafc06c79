"""Measure the share of a training step outside forward, backward and optimizer: launched with SHAPE STEPS.

Runs the real `train` and times the three calls; the rest of a step is collating, reducing the loss, checks, log and
watchdog. The first step is left out. The last line on stdout is JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.training import material
from trainer.runtime import distributed
from trainer.settings import TrainSettings

seconds: dict[str, float] = {}


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` to add its time to seconds[name]."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    return call


def main() -> None:
    shape, steps = sys.argv[1], int(sys.argv[2])
    distributed.initialize(600)
    from trainer.training import loop

    ends: list[float] = []
    optimizer_step = loop.optimizer_step

    def watched(state: Any, step: int, stop: Any) -> Any:
        if step == 0:
            state.engine.backward = timed("backward", state.engine.backward)
            state.engine.step = timed("optimizer", state.engine.step)
        result = optimizer_step(state, step, stop)
        if step == 0:
            seconds.clear()
        ends.append(time.perf_counter())
        return result

    loop.optimizer_step = watched
    loop.summed_token_loss = timed("forward", loop.summed_token_loss)
    with tempfile.TemporaryDirectory() as folder:
        loop.train(
            TrainSettings(
                train_shards=str(material.shards("train").path),
                output_dir=distributed.broadcast_object(folder),
                method=material.METHOD,
                model_name_or_path=str(material.model(shape, dropout=True)),
                deepspeed="ds_configs/zero1.json",
                max_steps=steps + 1,
                learning_rate=1e-4,
            )
        )
        whole = ends[-1] - ends[0]
        share = 1 - sum(seconds.values()) / whole
        if distributed.is_main_process():
            parts = {name: 100 * value / whole for name, value in seconds.items()}
            print(json.dumps({"share_percent": 100 * share, "parts_percent": parts}), flush=True)
        distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main()
