"""A run that was interrupted after its first step, from which both contenders of `resume` continue."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.harness import REPOSITORY
from benchmarks.training import material as training
from tests.distributed import run_well
from trainer.settings import TrainSettings
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory

RANKS = 2
TOTAL_STEPS = 2


def settings(folder: Path, output_dir: Path, stage: int) -> TrainSettings:
    """GPT-2's own shape of 124 million parameters, on short packs: a step is quick, a checkpoint is not."""
    return TrainSettings(
        train_shards=str(folder / "shards"),
        output_dir=str(output_dir),
        method=training.METHOD,
        config_name=str(folder / "config"),
        deepspeed=str(REPOSITORY / "ds_configs" / f"zero{stage}.json"),
        pack_length=256,
        learning_rate=1e-4,
        max_steps=TOTAL_STEPS,
        save_steps=1,
    )


def make(folder: Path, stage: int) -> Path:
    """Train one step with tools/train.py; returns the checkpoint."""
    run = RunDirectory(folder / f"stage{stage}")
    found = run.checkpoint(1)
    if atomic_dir.is_complete(found):
        return found
    shutil.rmtree(run.path, ignore_errors=True)
    shards = training.shards("train", 200)
    if not (folder / "shards").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "shards").symlink_to(shards.path.resolve())
    shutil.copytree(training.model("12x768", dropout=False), folder / "config", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("*.safetensors"))  # fmt: skip
    wanted = settings(folder, run.path, stage)
    flags = [
        f"--{name}={getattr(wanted, name)}"
        for name in ("train_shards", "output_dir", "method", "config_name", "deepspeed", "pack_length")
    ]
    flags += ["--learning_rate=1e-4", f"--max_steps={TOTAL_STEPS}", "--save_steps=1", "--save_total_limit=2"]
    run_well(["tools/train.py", *flags], RANKS, timeout=1800)
    shutil.rmtree(run.checkpoint(TOTAL_STEPS))  # as if it had been killed before its end
    return found
