"""The trainer itself: ours.py SHAPE STEPS {fp32,bf16}, on one rank or, launched, on more.

First one step on four problems without dropout, for the proof, and one to warm up; then STEPS steps of one pack a rank
a round, timed from the first batch to the last update. The last line on stdout is JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.processes import run_in_fork, turns
from benchmarks.training import material
from trainer.runtime import distributed
from trainer.runtime.stop_request import StopRequest
from trainer.settings import TrainSettings
from trainer.shards.read import Shards
from trainer.storage.run_directory import RunDirectory
from trainer.training.loop import optimizer_step
from trainer.training.setup import TrainState, setup_training

WARM_UP = 1


def main() -> None:
    shape, steps, bf16 = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "bf16"
    proof = run_in_fork(partial(proved, shape, bf16))
    distributed.initialize(600)
    stop = StopRequest()
    with tempfile.TemporaryDirectory() as folder:
        there = Path(distributed.broadcast_object(folder))
        model, pack_length = material.model(shape, dropout=True), material.PACK_LENGTHS[shape]
        state = set_up(there, model, material.shards("train"), 1, pack_length, bf16, stop)
        for step in range(WARM_UP):
            optimizer_step(state, step, stop)
        for number, _ in enumerate(turns()):
            distributed.barrier()
            first, start = WARM_UP + number * steps, time.perf_counter()
            metrics = [optimizer_step(state, step, stop)[0] for step in range(first, first + steps)]
            seconds = time.perf_counter() - start
            tokens = sum(line["tokens"] for line in metrics)
            if distributed.is_main_process():
                figures = {"tokens_per_second": tokens / seconds, "tokens": tokens, **proof}
                print(json.dumps(figures), flush=True)
        distributed.barrier()
    distributed.shutdown()


def proved(shape: str, bf16: bool) -> dict[str, float]:
    """Return the figures of one step on four problems, without dropout. Collective."""
    world = distributed.initialize(600)
    few = material.shards("train", material.PROOF_PROBLEMS)
    packs = -(-material.proof_packs(few) // world.world_size)
    with tempfile.TemporaryDirectory() as folder:
        there, stop = Path(distributed.broadcast_object(folder)), StopRequest()
        model = material.model(shape, dropout=False)
        state = set_up(there, model, few, packs, material.PROOF_PACK_LENGTH, bf16, stop)
        metrics, _ = optimizer_step(state, 0, stop)
        distributed.barrier()
    return {key: metrics[key] for key in material.PROOF}


def set_up(
    output: Path,
    model: Path,
    shards: Shards,
    packs_per_rank: int,
    pack_length: int,
    bf16: bool,
    stop: StopRequest,
) -> TrainState:
    """Return the state of the real training loop. Collective."""
    settings = TrainSettings(
        train_shards=str(shards.path),
        output_dir=str(output),
        method=material.METHOD,
        model_name_or_path=str(model),
        deepspeed="ds_configs/zero1.json",
        per_device_train_batch_size=packs_per_rank,
        pack_length=pack_length,
        max_steps=1000,
        learning_rate=1e-4,
        bf16=bf16,
    )
    state = setup_training(settings, distributed.environment(), RunDirectory(output), stop)
    assert state is not None
    return state


if __name__ == "__main__":
    main()
