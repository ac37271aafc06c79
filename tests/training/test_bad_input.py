"""Each mistake ends with one clear message and a non-zero exit on all ranks within seconds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed import Outcome, run, run_well
from tests.training.conftest import settings, trajectory
from trainer.run_directory import RunDirectory
from trainer.settings import TrainSettings, from_dict
from trainer.shards.read import Shards


def _train(folder: Path, values: dict[str, Any], num_ranks: int = 1, **environment: str) -> list[Outcome]:
    file = folder / "train.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return run(["tools/train.py", "--config", str(file)], num_ranks, **environment)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lerning_rate": 1}, r"unknown setting 'lerning_rate' \(did you mean 'learning_rate'\?\)"),
        ({"method": "socratik"}, "did you mean 'socratic'"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', expected float"),
        ({"max_steps": 1.5}, "max_steps is 1.5, expected int"),
        ({"bf16": "maybe"}, "bf16 is 'maybe', expected bool"),
        ({"model_name_or_path": "gpt2"}, "not both"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"save_steps": 0}, "save_steps is 0"),
        ({"eval_steps": 5}, "eval_shards is not"),
        ({"max_steps": 0, "num_train_epochs": 0}, "nothing to train"),
    ],
)
def test_settings_are_checked_where_they_are_made(changes: dict, message: str) -> None:
    values = {"train_shards": "s", "output_dir": "o", "config_name": "c", **changes}
    with pytest.raises(Exception, match=message):
        from_dict(TrainSettings, values, "mine.yaml")


def test_all_ranks_end_with_one_message(tmp_path: Path, stories: Shards) -> None:
    start = time.monotonic()
    outcomes = _train(
        tmp_path, settings(stories, tmp_path / "run", train_shards=str(tmp_path / "nowhere")), num_ranks=2
    )
    assert [outcome.status for outcome in outcomes] == [2, 2]
    assert "nowhere does not exist" in outcomes[0].output
    assert "Traceback" not in "".join(outcome.output for outcome in outcomes)
    assert time.monotonic() - start < 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config_name": "no/such-model"}, "no model config at no/such-model"),
        ({"config_overrides": "vocab_size=100"}, "has 100 embeddings but the shards' tokenizer has"),
        ({"config_overrides": "max_position_embeddings=64"}, "examples of up to"),
        ({"config_overrides": "n_layer=2"}, "'n_layer=2' does not name a setting"),
        ({"method": "socratic", "pack_length": 32}, "longer than pack_length 32"),
        (
            {"learning_rate": 1e20, "max_grad_norm": 0, "max_steps": 20},
            r"the loss on rank 0 is (nan|inf); problems of this rank: stories",
        ),
    ],
    ids=["model", "vocabulary", "context", "override", "pack", "not finite"],
)
def test_what_cannot_be_trained_is_named(
    tmp_path: Path, stories: Shards, changes: dict, message: str
) -> None:
    import re

    (outcome,) = _train(tmp_path, settings(stories, tmp_path / "run", **changes), HF_HUB_OFFLINE="1")
    assert outcome.status == 2, outcome.output
    assert re.search(message, outcome.output), outcome.output


def test_the_life_of_a_run_directory(tmp_path: Path, stories: Shards) -> None:
    """Finished stays finished, another run in the same place is refused, starting over must be asked for; W&B offline."""
    values = settings(stories, tmp_path / "run", max_steps=2, report_to="wandb")
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    (first,) = _train(tmp_path, values, **quiet)
    assert first.status == 0, first.output
    run_directory = RunDirectory(tmp_path / "run")
    wandb_id = run_directory.wandb_id.read_text()
    assert list(run_directory.logs.glob("wandb/offline-run-*"))
    environment = json.loads(run_directory.environment.read_text())
    assert environment["versions"]["deepspeed"] and environment["num_parameters"] > 0

    (again,) = _train(tmp_path, values, **quiet)
    assert again.status == 0 and "already finished" in again.output
    (other,) = _train(tmp_path, {**values, "learning_rate": 1.0}, **quiet)
    assert other.status == 2 and "learning_rate: 0.003 there, 1.0 now" in other.output
    (over,) = _train(tmp_path, {**values, "learning_rate": 1e-4, "overwrite_output_dir": True}, **quiet)
    assert over.status == 0, over.output
    assert trajectory(tmp_path / "run")[0]["learning_rate"] == 1e-4
    assert run_directory.wandb_id.read_text() == wandb_id


def test_periodic_evaluation_is_the_same_on_one_and_two_ranks(tmp_path: Path, stories: Shards) -> None:
    found = []
    for num_ranks in (1, 2):
        values = settings(
            stories,
            tmp_path / str(num_ranks),
            max_steps=2,
            gradient_accumulation_steps=2 // num_ranks,
            eval_steps=2,
            eval_shards=str(stories.path),
            eval_max_problems=20,
        )
        file = tmp_path / "train.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        run_well(["tools/train.py", "--config", str(file)], num_ranks)
        lines = [
            json.loads(line)
            for line in RunDirectory(tmp_path / str(num_ranks)).metrics.read_text().splitlines()
        ]
        found += [line["evaluation"] for line in lines if "evaluation" in line]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)
    assert found[0]["learned_tokens"] == found[1]["learned_tokens"] > 0
