"""A run killed with SIGKILL and resumed equals an undisturbed one bit for bit, with dropout, in every ZeRO stage."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from tests.distributed import Ranks, run_well
from tests.training.conftest import settings, train_many, trajectory
from trainer.shards.read import Shards
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory

STAGES = range(4)
STEPS = 9


def _settings(stories: Shards, config: Path, folder: Path, stage: int) -> dict:
    return settings(
        stories,
        folder,
        config_name=str(config),
        config_overrides="",
        deepspeed=f"ds_configs/zero{stage}.json",
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        save_steps=3,
        save_total_limit=3,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, stories: Shards, gpt2_config: Path) -> Path:
    """undisturbed/<stage>, and killed/<stage>, which was killed after step 4 and resumed from the checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("killed")
    train_many(
        folder, [_settings(stories, gpt2_config, folder / "undisturbed" / str(s), s) for s in STAGES], 2
    )
    resumed = []
    for stage in STAGES:
        values = _settings(stories, gpt2_config, folder / "killed" / str(stage), stage)
        file = folder / f"killed-{stage}.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        with Ranks(["tools/train.py", "--config", str(file)], 2) as ranks:
            _wait_for_step(Path(values["output_dir"]), 4, ranks)
            ranks.kill()
        resumed.append(values)
    train_many(folder, resumed, 2)
    return folder


def _wait_for_step(run: Path, step: int, ranks: Ranks) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (
            RunDirectory(run).metrics.exists()
            and len(RunDirectory(run).metrics.read_text().splitlines()) >= step
        ):
            return
        assert all(process.poll() is None for process in ranks.processes), ranks.wait()[0].output
        time.sleep(0.005)
    raise AssertionError("no step in two minutes")


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_the_undisturbed_run(folder: Path, stage: int) -> None:
    undisturbed = trajectory(folder / "undisturbed" / str(stage))
    killed = trajectory(folder / "killed" / str(stage))
    assert [step["loss"] for step in killed] == [step["loss"] for step in undisturbed]
    assert [step["grad_norm"] for step in killed] == [step["grad_norm"] for step in undisturbed]
    lines = RunDirectory(folder / "killed" / str(stage)).metrics.read_text().splitlines()
    assert len(lines) > STEPS  # steps were repeated
    for name, num_resumes in (("undisturbed", 0), ("killed", 1)):
        environment = json.loads(RunDirectory(folder / name / str(stage)).environment.read_text())
        assert environment["num_resumes"] == num_resumes and environment["processor"]


@pytest.mark.parametrize("stage", STAGES)
def test_final_weights_are_those_of_the_undisturbed_run(folder: Path, stage: int, tmp_path: Path) -> None:
    digests = []
    for name in ("undisturbed", "killed"):
        export = tmp_path / name
        run_well(
            ["tools/convert_checkpoint.py", str(folder / name / str(stage)), "--output_dir", str(export)]
        )
        digests.append(atomic_dir.read_manifest(export)["files"]["model.safetensors"]["sha256"])
    assert digests[0] == digests[1]


def test_dropout_was_on(folder: Path, gpt2_config: Path) -> None:
    assert json.loads((gpt2_config / "config.json").read_text())["resid_pdrop"] == 0.1
