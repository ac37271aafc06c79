"""Tests of plans: parameter counts, refusals, recommendations, and disk space of real checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.training.conftest import settings, train_many
from trainer.errors import UserError
from trainer.models import load, presets
from trainer.planning import plan, workload
from trainer.planning.command import print_study_plan
from trainer.planning.recommend import recommend, train_command
from trainer.planning.time import communication_volumes
from trainer.planning.zero_memory import (
    ACTIVATIONS,
    LOGITS,
    MASTER_WEIGHTS,
    OPTIMIZER,
    WEIGHTS,
    BucketFill,
    _simulate_buckets,
)
from trainer.runtime.terminal import size_text
from trainer.settings import PlanSettings
from trainer.shards.prepare import prepare
from trainer.shards.read import Shards
from trainer.storage.run_directory import RunDirectory
from trainer.study.study_file import load_study as load_study
from trainer.training import ds_config

# From the models' pages on the hub.
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1.4b": 1_414_647_808,
    "pythia-6.9b": 6_857_302_016,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}
TINY = {"config_name": "stories-0.2m", "pack_length": 256, "max_steps": 4}


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    from trainer.settings import PrepareSettings

    folder = tmp_path_factory.mktemp("shards") / "stories"
    return prepare(
        PrepareSettings(data="stories", tokenizer_name="stories", num_problems=60, output_dir=str(folder))
    )


def planned(**values: Any) -> plan.RunPlan:
    return plan.make_plan(PlanSettings(**{**TINY, **values}))


def test_every_named_shape_has_the_published_number_of_parameters() -> None:
    assert set(presets.published_names()) == set(PARAMETERS)
    found = {name: load.num_parameters(presets.published_config(name)) for name in presets.published_names()}
    assert found == PARAMETERS


def test_zero_stages_divide_weights_masters_and_moments() -> None:
    """Weights, masters and moments of 8 ranks in bf16: 2P, 4P and 8P bytes, divided by stage."""
    parameters = PARAMETERS["gpt2"] - 8 * 7_087_872
    values = {
        "config_name": "gpt2",
        "config_overrides": "n_layer=4",
        "bf16": True,
        "gpu": "a100-80gb",
        "gpus_per_node": 8,
    }
    one = planned(**values, deepspeed="ds_configs/zero1.json").memory.device
    three = planned(**values, deepspeed="ds_configs/zero3.json").memory.device
    assert one[WEIGHTS] == 2 * parameters
    assert one[MASTER_WEIGHTS] == pytest.approx(4 * parameters / 8, rel=1e-6)
    assert one[OPTIMIZER] == three[OPTIMIZER] == pytest.approx(8 * parameters / 8, rel=1e-6)
    # small parameters are not partitioned
    assert 2 * parameters / 8 < three[WEIGHTS] < 2 * parameters / 8 * 1.2
    offloaded = planned(**values, deepspeed="ds_configs/zero2_offload.json").memory
    assert not offloaded.device[OPTIMIZER]
    assert offloaded.host[OPTIMIZER] == one[OPTIMIZER]


def test_buckets_fill_as_gradients_arrive() -> None:
    """Bucket of 10: 4 and 5 fit, 6 does not (9 are reduced), 30 is too large for the buffer (6 reduced before it)."""
    assert list(_simulate_buckets([4, 5, 6, 30], 10, buffers=2)) == [
        BucketFill(4, 0, 0),
        BucketFill(9, 0, 0),
        BucketFill(15, 9, 9),
        BucketFill(15, 6, 15),
        BucketFill(15, 30, 45),
    ]


def test_a_run_that_does_not_fit_is_refused_with_the_missing_bytes_and_a_remedy() -> None:
    values = {"config_name": "pythia-6.9b", "bf16": True, "gpu": "rtx-4090", "pack_length": 2048}
    values["config_overrides"] = "num_hidden_layers=8"  # 2 billion parameters
    made = planned(**values, per_device_train_batch_size=8)
    assert not made.fits
    missing = size_text(made.memory.device_bytes - 24_564 * 2**20)
    assert f"has 25.8 GB, {missing} are missing" in made.refusals[0]
    assert made.refusals[0].startswith("memory: ")
    values["per_device_train_batch_size"] = 1
    host = planned(**values, deepspeed="ds_configs/zero3_offload.json", host_memory_gb=16)
    assert any(text.startswith("host memory: ") and "are missing" in text for text in host.refusals)
    assert recommend(host) is None


def test_disk_that_is_too_small_is_refused() -> None:
    made = planned(config_name="gpt2", gpu="h100", disk_gb=1, save_total_limit=3)
    assert made.disk.total_bytes == 4 * 16 * PARAMETERS["gpt2"] + 4 * PARAMETERS["gpt2"]
    assert any("lower save_total_limit" in text for text in made.refusals)


def test_the_recommended_configuration_fits_and_takes_the_same_step() -> None:
    asked = planned(
        config_name="gpt2", bf16=True, gpu="a100-40gb", gpus_per_node=4, pack_length=8192,
        per_device_train_batch_size=16, deepspeed="ds_configs/zero1.json",
    )  # fmt: skip
    found = recommend(asked)
    assert not asked.fits and found is not None and found.plan.fits
    new = found.plan.settings
    assert new.per_device_train_batch_size * new.gradient_accumulation_steps == 16
    # a trace of this batch gives what was scaled from one and two packs
    again = plan.make_plan(new).memory
    traced = again.device[ACTIVATIONS] + again.device[LOGITS]
    assert traced == pytest.approx(found.plan.memory.device[ACTIVATIONS], rel=0.02)
    assert "--gpu" not in train_command(new, asked.hardware)


@pytest.fixture(scope="session")
def trained(stories: Shards, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Settings of four finished runs on two ranks, by ZeRO stage."""
    folder = tmp_path_factory.mktemp("trained")
    shape = {"config_name": "stories-0.7m", "config_overrides": "", "max_steps": 4}
    runs = [
        settings(stories, folder / f"zero{stage}", **shape, deepspeed=f"ds_configs/zero{stage}.json")
        for stage in range(4)
    ]
    train_many(folder, runs, 2)
    return runs


def test_checkpoints_take_the_planned_bytes(trained: list[dict[str, Any]]) -> None:
    for values in trained:
        run = RunDirectory(Path(values["output_dir"]))
        asked = PlanSettings(**values)
        expected = plan.estimate_disk(
            workload.estimate_workload(asked, 2), ds_config.resolve_ds_config(asked, 2), 2
        ).checkpoint_bytes
        files = [path for path in run.checkpoint(4).rglob("*") if path.is_file()]
        found = sum(path.stat().st_size for path in files if path.parent.name != "model")
        assert found == pytest.approx(expected, rel=0.03), values["deepspeed"]


def test_calibration_takes_a_run_s_measured_speed(trained: list[dict[str, Any]]) -> None:
    folder = trained[1]["output_dir"]
    lines = RunDirectory(Path(folder)).metrics.read_text(encoding="utf-8").splitlines()
    speed = sorted(json.loads(line)["tokens_per_second"] for line in lines[1:])[1]
    made = plan.make_plan(PlanSettings(**trained[1], calibrate=folder, gpu="cpu", gpus_per_node=2))
    assert made.step.compute_seconds == pytest.approx(made.workload.tokens_per_step / speed, rel=1e-3)
    assert made.step.rate.source.startswith("measured: ")


def test_volumes_moved_in_a_step() -> None:
    """With accumulation ZeRO-1 moves three volumes, ZeRO-2 two per micro-batch and one more (measured)."""
    assert [communication_volumes(stage, 4) for stage in range(4)] == [2, 3, 9, 12]
    single = planned(gpu="h100", gpus_per_node=8, config_name="gpt2", bf16=True).step
    several = planned(gpu="h100", gpus_per_node=8, nodes=2, config_name="gpt2", bf16=True).step
    assert several.is_extrapolated and not single.is_extrapolated
    assert several.communication_seconds > 5 * single.communication_seconds


def test_shards_decide_targets_and_steps(stories: Shards) -> None:
    known = planned(train_shards=str(stories.path), max_steps=0, num_train_epochs=2, pack_length=512)
    assert known.workload.total_steps > 0 and not known.workload.assumptions
    assert 0 < known.workload.num_target_tokens < sum(known.workload.lengths) <= 512
    assumed = planned(max_steps=0)
    assert assumed.workload.total_steps == 0 and "no train_shards" in assumed.notes[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu": "a100-80g"}, r"gpu is 'a100-80g'; choose one of .*did you mean 'a100-80gb'"),
        ({"nodes": 0}, "nodes is 0; it must be at least 1"),
        ({"bf16": True, "deepspeed": "ds_configs/zero0.json"}, "wrongly in bf16 at ZeRO stage 0"),
        ({"config_name": "./no-such-model"}, "./no-such-model does not exist"),
        ({"calibrate": "no-such-run"}, "calibrate: no-such-run is not a run directory"),
    ],
)
def test_wrong_settings_are_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(**values)


def test_the_command_line_prints_json_and_exits_with_1_if_the_run_does_not_fit() -> None:
    flags = [
        "--config_name",
        "stories-0.7m",
        "--gpu",
        "v100",
        "--max_steps",
        "5",
        "--json",
        "--disk_gb",
        "0.001",
    ]
    done = subprocess.run(
        [sys.executable, "tools/plan.py", *flags], capture_output=True, text=True, cwd=REPOSITORY
    )
    result = json.loads(done.stdout)
    assert done.returncode == 1
    assert result["fits"] is False and "disk" in result["refusals"][0]
    assert result["num_parameters"] == 734_080
    assert result["memory"]["device_bytes"] == sum(result["memory"]["device"].values())
    assert result["measured_error"]["memory"]["largest"] <= 0.10, "the planner's promise"
    assert result["recommended"]["changes"] == ["--deepspeed ds_configs/zero1.json (asked: none)"]


def test_a_study_is_planned_run_by_run(capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.commands.command_line import read_yaml

    file = REPOSITORY / "studies" / "quickstart.yaml"
    study = load_study(read_yaml(file), file)
    asked = PlanSettings(study=str(file), gpu="cpu", gpus_per_node=2, disk_gb=0.02, json=True)
    assert not print_study_plan(asked, study)
    result = json.loads(capsys.readouterr().out)
    assert set(result["runs"]) == {run.name for run in study.runs if run.train}
    hours = sum(run["time"]["accelerator_hours"] for run in result["runs"].values())
    assert result["totals"]["accelerator_hours"] == pytest.approx(hours) and hours > 0
    # only the checkpoints of the largest model are too large
    refused = {name for name, run in result["runs"].items() if not run["fits"]}
    assert refused == {name for name in result["runs"] if ".0.4m." in name}
    assert all("disk: " in result["runs"][name]["refusals"][0] for name in refused)


def test_a_study_is_planned_on_its_own_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    file = REPOSITORY / "studies" / "quickstart.yaml"
    study = load_study(yaml.safe_load(file.read_text()), file)
    print_study_plan(PlanSettings(study=str(file), gpu="cpu", json=True), study)
    plans = json.loads(capsys.readouterr().out)["runs"]
    expected = {run.name: run.num_ranks for run in study.runs if run.train}
    assert {name: plan["per_node"] for name, plan in plans.items()} == expected
    assert set(expected.values()) == {1, 2}


def test_a_study_without_training_is_refused_with_the_reason() -> None:
    file = REPOSITORY / "studies" / "quickstart.yaml"
    study = load_study(yaml.safe_load(file.read_text()), file)
    evaluated_only = replace(study, runs=tuple(replace(run, train=None) for run in study.runs[:1]))
    with pytest.raises(UserError, match="has no training to plan"):
        print_study_plan(PlanSettings(study=str(file)), evaluated_only)


def test_ds_configs_are_found_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recommended = recommend(planned(gpu="a100-40gb"))
    assert recommended is not None and recommended.plan.settings.deepspeed.endswith("zero1.json")


@pytest.mark.slow
def test_real_training_takes_the_planned_memory(tmp_path: Path, stories: Shards) -> None:
    """Two of the benchmark's cases, through the real command line."""
    from benchmarks.plan_accuracy import Case, configs, measure

    cases = [Case("gpt2 6x384", 2), Case("llama 8x512", 3)]
    result = measure(cases, configs(tmp_path), stories.path)
    assert [abs(row["error"]) < 0.10 for row in result["memory"]] == [True, True], result["memory"]
