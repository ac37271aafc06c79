"""The last lines of the tools: the result, and the next command, which runs as printed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed import REPOSITORY
from trainer.commands import next_command
from trainer.commands.command_line import parse
from trainer.settings import ConvertSettings, EvaluateSettings, PlotSettings, PrepareSettings, TrainSettings
from trainer.shards.methods import VIEWS
from trainer.storage import atomic_dir
from trainer.storage.run_directory import EvaluationDirectory, RunDirectory
from trainer.study.processes import STUDY_VARIABLE
from trainer.training.metrics_log import result_text

COMMAND_SETTINGS: dict[str, Any] = {
    "prepare_shards": PrepareSettings,
    "train": TrainSettings,
    "convert_checkpoint": ConvertSettings,
    "evaluate": EvaluateSettings,
    "plot_scaling": PlotSettings,
}


def parsed(command: list[str]) -> Any:
    """Parse a command with the parser of its tool, which exits with status 2 for a wrong flag or value."""
    return parse(COMMAND_SETTINGS[command[0]], "", command[1:])


def run(folder: Path, command: str, **environment: str) -> list[str]:
    """Run a command line that starts with `python` and return its lines. It must succeed."""
    python, *arguments = shlex.split(command)
    assert python == "python"
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def test_the_printed_commands_lead_from_problems_to_the_report(tmp_path: Path) -> None:
    prepare = f"python {REPOSITORY / 'tools' / 'prepare_shards.py'} --data stories --tokenizer_name stories"
    run(tmp_path, f"{prepare} --num_problems 20 --split test --output_dir shards/stories-test")
    *_, result, line = run(tmp_path, f"{prepare} --num_problems 50 --output_dir shards/stories-train")
    assert result.startswith("shards/stories-train: 50 problems, 0 rejected, ")
    results = {}
    for name, flags in (
        ("train", " --max_steps 2 --learning_rate 1e-3"),
        ("convert_checkpoint", ""),
        ("evaluate", " --max_new_tokens 8"),
    ):
        command = line.removeprefix("next: ")
        assert command != line and shlex.split(command)[1] == str(REPOSITORY / "tools" / f"{name}.py")
        *_, results[name], line = run(tmp_path, command + flags)
    run(tmp_path, line.removeprefix("next: "))
    study = "runs/mine"
    directory = RunDirectory(Path(study) / "stories.socratic.stories-0.2m.s0")
    (loss,) = [step["loss"] for step in metrics(tmp_path / directory.metrics) if step["step"] == 2]
    assert results["train"].startswith(f"{directory.path}: finished at step 2/2: loss {loss:.4f}, ")
    assert results["train"].endswith(f"s; {directory.checkpoint(2)}")
    parameters = atomic_dir.read_manifest(tmp_path / directory.export)["facts"]["num_parameters"]
    assert f"to {directory.export}: {parameters:,} parameters, " in results["convert_checkpoint"]
    assert results["evaluate"].startswith("strict 0.0 % (0/20, 95 %: 0.0-16.1), ")
    assert results["evaluate"].endswith("results.json")
    assert (tmp_path / study / "report" / "index.html").is_file()

    convert = f"python {REPOSITORY / 'tools' / 'convert_checkpoint.py'} {directory.path}"
    (line,) = run(tmp_path, convert, **{STUDY_VARIABLE: "runs/mine"})
    assert line == f"already exported: {directory.export}", "a study runs the next command itself"


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("split", "counts", "tokenizer", "expected"),
    [
        ("train", {"socratic": 5, "cot": 9}, "openai-community/gpt2", ("socratic", "openai-community/gpt2")),
        ("train_socratic", {"socratic": 0, "cot": 9}, "FOLDER", ("cot", "FOLDER")),
        ("mine", {"socratic": 0, "cot": 0, "answer_only": 9}, "NO_MODEL", ("answer_only", "MODEL")),
        ("test_socratic", {"socratic": 5}, "gpt2", None),
    ],
)
def test_shards_are_followed_by_a_training_that_they_support(
    tmp_path: Path,
    split: str,
    counts: dict[str, int],
    tokenizer: str,
    expected: tuple[str, str] | None,
) -> None:
    folders = {name: tmp_path / name for name in ("FOLDER", "NO_MODEL")}
    for folder in folders.values():
        folder.mkdir()
    (folders["FOLDER"] / "config.json").touch()
    name = str(folders.get(tokenizer, tokenizer))
    shards = PrepareSettings(output_dir="shards/a b", tokenizer_name=name)
    facts = {"data": "gsm8k", "split": split, "problems_per_method": counts}
    settings = parsed(next_command.after_prepare(shards, facts))
    if expected is None:
        assert (settings.shards, settings.model_name_or_path) == ("shards/a b", "EXPORT")
        return
    method, model = expected
    assert (settings.train_shards, settings.method) == ("shards/a b", method)
    assert settings.model_name_or_path == str(folders.get(model, model))
    label = Path(model).name
    assert settings.output_dir == f"runs/mine/gsm8k.{method}.{label}.s0"


@pytest.fixture
def make_export(tmp_path: Path) -> Callable[[str], RunDirectory]:
    """Return a function that makes a run directory with an export, without weights, of a method."""

    def make(method: str) -> RunDirectory:
        run = RunDirectory(tmp_path / "runs" / f"gsm8k.{method}.tiny.s0")
        with atomic_dir.atomic_directory(run.export, "export", {"method": method}) as staging:
            (staging / "config.json").touch()
        run.settings.write_text(yaml.safe_dump({"train_shards": str(tmp_path / "shards" / "gsm8k-train")}))
        return run

    return make


@pytest.mark.parametrize("method", VIEWS)
def test_every_export_is_followed_by_an_evaluation(
    tmp_path: Path, make_export: Callable[[str], RunDirectory], method: str
) -> None:
    run = make_export(method)
    settings = parsed(next_command.after_convert(run.export))
    models = (settings.model_name_or_path, settings.decomposer, settings.solver, settings.planner)
    assert models.count(str(run.export)) == 1
    solver = str(tmp_path / "runs" / "gsm8k.solver.tiny.s0" / "export")
    assert settings.solver in ("", solver)
    assert settings.shards == "TEST_SHARDS" and settings.output_dir == ""
    test = tmp_path / "shards" / "gsm8k-test"
    with atomic_dir.atomic_directory(test, "shards", {}) as staging:
        (staging / "tokens.bin").touch()
    assert parsed(next_command.after_convert(run.export)).shards == str(test)


def test_an_export_outside_a_run_directory_needs_a_folder_for_results(tmp_path: Path) -> None:
    with atomic_dir.atomic_directory(tmp_path / "model", "export", {"method": "cot"}) as staging:
        (staging / "config.json").touch()
    settings = parsed(next_command.after_convert(tmp_path / "model"))
    assert (settings.model_name_or_path, settings.output_dir) == (str(tmp_path / "model"), "RESULTS")


def test_an_evaluation_in_a_run_is_followed_by_the_report(make_export: Callable[[str], RunDirectory]) -> None:
    run = make_export("cot")
    command = next_command.after_evaluate(run.evaluation("gsm8k-test-cot"))
    assert parsed(command).runs == [str(run.path.parent)]
    assert next_command.after_evaluate(EvaluationDirectory(run.path / "elsewhere")) == []


def test_annotations_are_followed_by_shards() -> None:
    settings = parsed(next_command.after_annotate("annotations/svamp-train", "train"))
    assert settings.data_path == "annotations/svamp-train/result/annotated.jsonl"
    assert settings.output_dir == "shards/svamp-train"


def test_a_command_has_the_form_in_which_the_tool_was_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(STUDY_VARIABLE, raising=False)
    programs = {
        "tools/train.py": "python tools/convert_checkpoint.py",
        "socratic train": "socratic convert_checkpoint",
        "/venv/trainer/commands/train.py": "socratic convert_checkpoint",
    }
    for started, expected in programs.items():
        monkeypatch.setattr(sys, "argv", [started])
        next_command.print_next(["convert_checkpoint", "runs/a b"])
        assert capsys.readouterr().out == f"next: {expected} 'runs/a b'\n"
    monkeypatch.setattr("trainer.runtime.distributed.is_main_process", lambda: False)
    next_command.print_next(["convert_checkpoint", "runs/a b"])
    assert capsys.readouterr().out == ""


def test_the_result_of_a_training_is_read_from_its_metrics(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert result_text(file) == ""
    old = [{"step": 1, "loss": 2.0, "seconds": 30.0}, {"step": 2, "loss": 1.0, "seconds": 40.0}]
    file.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert result_text(file) == "loss 1.0000, 1m10s", "release 0.1 recorded the time of steps only"
    new = [
        {"step": 2, "evaluation": {"loss": 1.5}},
        {"step": 3, "loss": 0.5, "seconds": 1.0, "run_seconds": 90},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*old, *new]))
    assert result_text(file) == "loss 0.5000, validation loss 1.5000, 1m30s"
    assert result_text(file, 100.0) == "loss 0.5000, validation loss 1.5000, 1m40s"
