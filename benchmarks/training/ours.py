"""The trainer itself: python ours.py SHAPE STEPS, on one rank or, launched, on more.

First one step on four problems without dropout, for the proof; then STEPS steps of one pack a rank, timed from the
first batch to the last update. The last line on stdout is JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.training import material
from trainer import distributed
from trainer.preemption import StopRequest
from trainer.run_directory import RunDirectory
from trainer.settings import TrainSettings
from trainer.shards.read import Shards


def main() -> None:
    shape, steps = sys.argv[1], int(sys.argv[2])
    world = distributed.initialize(600)
    few = material.shards("train", material.PROOF_PROBLEMS)
    packs = material.proof_packs(few)
    per_rank = -(-packs // world.world_size)
    proof = train(material.model(shape, dropout=False), few, 1, per_rank, material.PROOF_PACK_LENGTH)
    timed = train(
        material.model(shape, dropout=True), material.shards("train"), steps, 1, material.PACK_LENGTH
    )
    if distributed.is_main_process():
        print(json.dumps({**timed, **{key: [proof[key]] for key in material.PROOF}}), flush=True)
    distributed.shutdown()


def train(model: Path, shards: Shards, steps: int, packs_per_rank: int, pack_length: int) -> dict[str, Any]:
    """Collective. Train some steps of the real loop, without the checkpoint at its end."""
    from trainer.training.loop import optimizer_step
    from trainer.training.student import enrol

    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(distributed.broadcast_object(folder)))
        settings = TrainSettings(
            train_shards=str(shards.path),
            output_dir=str(run.path),
            method=material.METHOD,
            model_name_or_path=str(model),
            deepspeed="ds_configs/zero1.json",
            per_device_train_batch_size=packs_per_rank,
            pack_length=pack_length,
            max_steps=steps,
            learning_rate=1e-4,
        )
        stop = StopRequest()
        student = enrol(settings, distributed.world(), run, stop)
        assert student is not None
        start, cpu_start = time.perf_counter(), time.process_time()
        metrics = [optimizer_step(student, step, stop)[0] for step in range(steps)]
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        distributed.barrier()
    tokens = sum(line["tokens"] for line in metrics)
    return {
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "cpu_seconds": cpu_seconds,
        **{key: metrics[0][key] for key in material.PROOF},
    }


if __name__ == "__main__":
    main()
