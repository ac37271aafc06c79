"""Resume one rank from a checkpoint: resume.py ours|deepspeed FOLDER STAGE CHECKPOINT OUTPUT_DIR

Ours finds the checkpoint in its run directory, compares every byte with its digest, builds an engine without weights and
reads the byte ranges it needs. The peer does what a script with DeepSpeed does: it builds the same engine with the
model's weights, and `load_checkpoint` unpickles its files into it. Both then take the same step, ours
after it has seen that packed examples do not see each other. `seconds` begins when the libraries are loaded.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank")]

from trainer.runtime import distributed, startup, terminal  # noqa: E402

startup.pause_gc()

import deepspeed  # noqa: E402, F401
import transformers  # noqa: E402
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine  # noqa: E402
from transformers import GPT2LMHeadModel  # noqa: E402, F401

from benchmarks.start import material  # noqa: E402
from trainer.runtime.stop_request import StopRequest  # noqa: E402
from trainer.storage.run_directory import RunDirectory  # noqa: E402
from trainer.training.loop import log_run_header, optimizer_step  # noqa: E402
from trainer.training.setup import setup_training  # noqa: E402


def main() -> None:
    loaded = time.time()
    name, folder, stage, path, output = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    world = distributed.initialize()
    run = RunDirectory(Path(output))
    stop = StopRequest()
    state = setup_training(material.settings(Path(folder), run.path, int(stage)), world, run, stop)
    assert state is not None
    if name == "deepspeed":
        state.engine.checkpoint_engine = TorchCheckpointEngine()
        found, _ = state.engine.load_checkpoint(str(Path(path).parent), tag=Path(path).name)
        assert found is not None
    distributed.barrier()
    restored = time.time()
    if name == "ours":
        log_run_header(state)
    metrics, _ = optimizer_step(state, 1, stop)
    done = time.time()
    if world.rank == 0:
        figures = {
            "seconds": done - loaded,
            "seconds_to_engine": restored - loaded,
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
        }
        print(json.dumps(figures), flush=True)


terminal.run_main(main)
