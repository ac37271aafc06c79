from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_well
from trainer.settings import PrepareSettings
from trainer.shards.prepare import prepare
from trainer.shards.read import Shards
from trainer.storage.run_directory import RunDirectory

SIZES = "num_hidden_layers=2,hidden_size=48,intermediate_size=64,num_attention_heads=4,num_key_value_heads=2"


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("shards") / "stories"
    return prepare(
        PrepareSettings(data="stories", tokenizer_name="stories", num_problems=60, output_dir=str(folder))
    )


@pytest.fixture(scope="session")
def gpt2_config(tmp_path_factory: pytest.TempPathFactory, stories: Shards) -> Path:
    """A small GPT-2: tied embeddings, learned positions, dropout."""
    from transformers import GPT2Config

    folder = tmp_path_factory.mktemp("gpt2")
    vocabulary = stories.facts["vocabulary_size"]
    GPT2Config(vocab_size=vocabulary, n_layer=2, n_embd=48, n_head=4, n_positions=512).save_pretrained(folder)
    return folder


def settings(shards: Shards, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Return the settings of a run of a few steps."""
    values = {
        "train_shards": str(shards.path),
        "output_dir": str(output_dir),
        "method": "socratic",
        "config_name": "stories-0.2m",
        "config_overrides": SIZES,
        "pack_length": 512,
        "learning_rate": 3e-3,
        "max_steps": 6,
        "save_steps": 100,
        "weight_decay": 0.1,
        "seed": 1,
    }
    return {**values, **changes}


def train_many(
    folder: Path, runs: list[dict[str, Any]], num_ranks: int, *flags: str, **environment: str
) -> str:
    """Train runs one after another in the same processes and return the output of rank 0."""
    file = folder / f"runs-{num_ranks}.json"
    file.write_text(json.dumps(runs), encoding="utf-8")
    command = ["-m", "tests.training.train_many", str(file), *flags]
    return run_well(command, num_ranks, timeout=600, **environment)


def trajectory(output_dir: Path) -> list[dict[str, Any]]:
    """Return the steps of a run; of a repeated step the last line is valid."""
    lines = RunDirectory(output_dir).metrics.read_text(encoding="utf-8").splitlines()
    steps = {line["step"]: line for line in map(json.loads, lines) if "loss" in line}
    return [steps[step] for step in sorted(steps)]
