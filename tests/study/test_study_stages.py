from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.commands import command_line
from trainer.errors import UserError
from trainer.settings import ConvertSettings, EvaluateSettings, PlotSettings, PrepareSettings, TrainSettings
from trainer.study import stages
from trainer.study.study_file import Study
from trainer.teacher.settings import AnnotateSettings

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MakeStudy = Callable[[dict[str, Any]], Study]


@pytest.fixture(autouse=True)
def all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def commands(study: Study) -> list[list[str]]:
    return [
        stages.stage_command(stage, Path("tools"), study.launcher, 23456)
        for stage in stages.study_stages(study)
    ]


def test_commands_of_a_study(values: dict[str, Any], make_study: MakeStudy) -> None:
    values["methods"] = ["cot"]
    values["train"]["packing"] = False
    run = "runs/tiny/stories.cot.small.s0"
    prepare_train, prepare_test, train, convert, evaluate, report = commands(make_study(values))
    python = sys.executable
    prepare = [python, "tools/prepare_shards.py"]
    assert prepare_train[:2] == prepare
    assert {*prepare_train[2:]} == {
        "--num_problems=300",
        "--tokenizer_name=stories",
        "--output_dir=shards/stories-train",
    }
    assert {"--split=test", "--num_problems=30"} <= {*prepare_test}
    assert train[:5] == [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port=23456", "tools/train.py"]
    assert {*train[5:]} == {
        *("--train_shards=shards/stories-train", f"--output_dir={run}", "--method=cot", "--max_steps=2"),
        *("--config_name=stories-0.2m", "--model_label=small", "--packing=false"),
    }
    assert convert == [
        python,
        "tools/convert_checkpoint.py",
        run,
        f"--output_dir={run}/export",
        "--overwrite=true",
    ]
    assert evaluate[:5] == [str(BIN / "mpiexec"), "-n", "2", python, "tools/evaluate.py"]
    assert {*evaluate[5:]} == {
        *(f"--model_name_or_path={run}/export", "--shards=shards/stories-test"),
        f"--output_dir={run}/evaluation/stories-test-cot",
    }
    assert report == [python, "tools/plot_scaling.py", "runs/tiny"]


@pytest.mark.parametrize(
    ("launcher", "ranks", "train", "evaluate"),
    [
        ("auto", 1, "python", "python"),
        ("auto", 2, "deepspeed", "mpiexec"),
        ("deepspeed", 1, "python", "python"),
        ("deepspeed", 2, "deepspeed", "deepspeed"),
        ("mpiexec", 2, "mpiexec", "mpiexec"),
    ],
)
def test_launchers(
    values: dict[str, Any], make_study: MakeStudy, launcher: str, ranks: int, train: str, evaluate: str
) -> None:
    made = commands(make_study({**values, "launcher": launcher, "num_ranks": ranks}))
    assert made[2][0] == (sys.executable if train == "python" else str(BIN / train))
    assert made[4][0] == (sys.executable if evaluate == "python" else str(BIN / evaluate))


def test_the_devices_that_are_visible_are_used(
    values: dict[str, Any], make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --num_gpus the deepspeed launcher ignores CUDA_VISIBLE_DEVICES and takes the first devices."""
    study = make_study(values)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    assert commands(study)[2][1:2] == ["--include=localhost:2,5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    with pytest.raises(UserError, match="has 1 devices for 2 ranks"):
        commands(study)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3a,GPU-3b")
    with pytest.raises(UserError, match="launcher: mpiexec"):
        commands(study)
    assert commands(make_study({**values, "launcher": "mpiexec"}))[2][0].endswith("mpiexec")


def test_the_devices_of_a_stage_override_the_environment(
    values: dict[str, Any], make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = stages.study_stages(make_study(values))[2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    added = stages.stage_environment(train, cores=2, devices=["2", "3"])
    assert added["CUDA_VISIBLE_DEVICES"] == "2,3"
    command = stages.stage_command(train, Path("tools"), "deepspeed", 23456, {**os.environ, **added})
    assert "--include=localhost:2,3" in command


def test_threads_are_shared_by_the_ranks(
    values: dict[str, Any], make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    prepare, _, train, *_ = stages.study_stages(make_study(values))
    assert stages.stage_environment(train, cores=8) == {"OMP_NUM_THREADS": "4"}
    assert stages.stage_environment(train, cores=1) == {"OMP_NUM_THREADS": "1"}
    assert stages.stage_environment(train, cores=0) == {"OMP_NUM_THREADS": "1"}, (
        "more stages at a time than cores"
    )
    assert stages.stage_environment(prepare, cores=8) == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert stages.stage_environment(train, cores=8) == {}


def test_tools_parse_flags_to_the_same_settings(values: dict[str, Any], make_study: MakeStudy) -> None:
    values["train"] |= {"learning_rate": 1.7e-5, "packing": False, "config_overrides": "n_layer=2,n_embd=-1"}
    values["evaluate"] = {"calculator": False, "temperature": 0.7, "seed": 3}
    values["convert"] = {"dtype": "bf16"}
    classes = {"prepare": PrepareSettings, "train": TrainSettings, "convert": ConvertSettings}
    classes |= {"evaluate": EvaluateSettings, "report": PlotSettings, "annotate": AnnotateSettings}
    values["annotate"] = {"model_name_or_path": "teacher", "stop": ["\n\n", "-x"]}
    annotated = {"train": {"data": "svamp", "data_path": "a/svamp", "annotate": {}}, "test": {}, "more": {}}
    values["data"] = {"stories": values["data"]["stories"], "svamp": annotated}
    values["prepare"] |= {"data_path": "a/svamp"}
    values["data"]["stories"] = {
        name: {**given, "data_path": ""} for name, given in values["data"]["stories"].items()
    }
    for stage in stages.study_stages(make_study(values)):
        command = stages.stage_command(stage, Path("tools"), "mpiexec")
        start = next(index for index, part in enumerate(command) if part.endswith(".py"))
        assert command_line.parse(classes[stage.kind], "", command[start + 1 :]) == stage.settings


def test_commands_exist() -> None:
    for script in stages.SCRIPTS.values():
        assert (REPOSITORY / "tools" / script).is_file(), script
    assert os.access(stages.deepspeed_command(), os.X_OK)
