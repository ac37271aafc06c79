"""Each mistake in the input ends with one message and a non-zero exit status on all ranks within seconds."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed import Outcome, run
from tests.training.conftest import settings, train_many, trajectory
from trainer.settings import TrainSettings
from trainer.shards.read import Shards
from trainer.storage.configuration import from_dict
from trainer.storage.run_directory import RunDirectory


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
        ({"model_name_or_path": "gpt2"}, "are both set"),
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


CANNOT_BE_TRAINED = {
    "model": ({"config_name": "no/such-model"}, "no model config at no/such-model"),
    "vocabulary": (
        {"config_overrides": "vocab_size=100"},
        "has 100 embeddings but token",
    ),
    "context": ({"config_overrides": "max_position_embeddings=64"}, "examples of up to"),
    "override": ({"config_overrides": "n_layer=2"}, "has no setting 'n_layer'"),
    "pack": ({"pack_length": 32}, "longer than pack_length 32"),
} | {
    f"not finite, ZeRO {stage}": (
        {
            "learning_rate": 1e20,
            "max_grad_norm": 0,
            "max_steps": 20,
            "deepspeed": f"ds_configs/zero{stage}.json",
        },
        r"(the loss on rank 0 is (nan|inf)|the gradient is not finite).*problems of this rank: stories",
    )
    for stage in (0, 1, 2)
}


def test_what_cannot_be_trained_is_named(tmp_path: Path, stories: Shards) -> None:
    runs = [settings(stories, tmp_path / name, **changes) for name, (changes, _) in CANNOT_BE_TRAINED.items()]
    printed = train_many(tmp_path, runs, 1, "--collect", HF_HUB_OFFLINE="1")
    for number, (name, (_, message)) in enumerate(CANNOT_BE_TRAINED.items()):
        assert re.search(rf"run {number}: .*{message}", printed), f"{name}\n{printed}"


def test_a_used_run_directory(tmp_path: Path, stories: Shards) -> None:
    """A finished run is not repeated, another run is refused, --overwrite_output_dir starts from zero; W&B offline."""
    values = settings(stories, tmp_path / "run", max_steps=2, report_to="wandb")
    other = {**values, "learning_rate": 1.0}
    overwriting = {**values, "learning_rate": 1e-4, "overwrite_output_dir": True}
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    printed = train_many(tmp_path, [values, values, other, overwriting], 1, "--collect", **offline)
    assert printed.count("already finished") == 1
    assert re.search(r"run 2: .*learning_rate: 0.003 there, 1.0 now", printed)
    assert trajectory(tmp_path / "run")[0]["learning_rate"] == 1e-4

    run_directory = RunDirectory(tmp_path / "run")
    assert len(list(run_directory.logs.glob("wandb/offline-run-*"))) == 2
    ids = {path.name.rsplit("-", 1)[1] for path in run_directory.logs.glob("wandb/offline-run-*")}
    assert ids == {run_directory.wandb_id.read_text().strip()}  # one W&B run across restarts
    environment = json.loads(run_directory.environment.read_text())
    assert environment["versions"]["deepspeed"]
    assert environment["num_parameters"] > 0
