"""Commands and their flags: --help, precedence of flags over the file, errors, earlier names of settings."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from trainer.commands.command_line import parse
from trainer.commands.main import COMMANDS
from trainer.errors import UserError
from trainer.settings import PlotSettings, TrainSettings
from trainer.storage import configuration
from trainer.storage.configuration import from_dict, setting
from trainer.study import checks

ROOT = Path(__file__).parents[2]
TOOLS = sorted((ROOT / "tools").glob("*.py"))
NOT_COMMANDS = {"__init__", "__main__", "main", "command_line", "extras", "launcher", "next_command"}
REQUIRED = ["--train_shards", "s", "--output_dir", "o", "--config_name", "c"]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_help_teaches_and_imports_nothing_heavy(tool: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(tool), "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert f"socratic {tool.stem} " in done.stdout  # an example to copy
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "deepspeed", "numpy", "datasets"}


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_tools_are_thin(tool: Path) -> None:
    assert len(tool.read_text(encoding="utf-8").splitlines()) <= 10


def test_every_command_has_a_script_and_a_summary() -> None:
    modules = {path.stem for path in (ROOT / "trainer" / "commands").glob("*.py")} - NOT_COMMANDS
    assert modules == set(COMMANDS) == {tool.stem for tool in TOOLS}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--help"], 0, "convert a ZeRO checkpoint to a Hugging Face folder"),
        ([], 2, "usage: socratic COMMAND"),
        (["--version"], 0, "0."),
        (["trian"], 2, "there is no command 'trian' (did you mean 'train'?)"),
        (["plan", "--help"], 0, "usage: socratic plan "),
        (["prepare_shards", "--seed", "x"], 2, "socratic prepare_shards: error: flags: seed is 'x'"),
    ],
)
def test_the_module_runs_commands(arguments: list[str], status: int, message: str) -> None:
    command = [sys.executable, "-m", "trainer.commands", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, message in done.stdout + done.stderr) == (status, True), done


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 5e-4\nseed: 3\nbf16: true\n")
    settings = parse(TrainSettings, "", [*REQUIRED, "--config", str(file), "--seed", "4", "--local_rank=1"])
    assert (settings.learning_rate, settings.seed, settings.bf16) == (5e-4, 4, True)
    assert settings.warmup_steps == 0


@pytest.mark.parametrize(("flags", "value"), [(["--bf16"], True), (["--bf16", "false"], False), ([], False)])
def test_a_switch_is_given_alone_or_with_a_value(flags: list[str], value: bool) -> None:
    assert parse(TrainSettings, "", [*REQUIRED, *flags]).bf16 is value


def test_positional_lists(tmp_path: Path) -> None:
    assert parse(PlotSettings, "", ["runs/a", "runs/b", "--title", "x"]).runs == ["runs/a", "runs/b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*REQUIRED, "--max_step", "3"], "unknown flag --max_step (did you mean '--max_steps'?); see --help"),
        ([*REQUIRED, "--fp16=true"], "unknown flag --fp16 (did you mean '--bf16'?)"),
        (REQUIRED[:4], "no model: give model_name_or_path"),
        ([*REQUIRED, "--model_name_or_path", "m"], "are both set"),
        ([*REQUIRED, "--seed", "x"], "seed is 'x', expected int"),
        ([], "train_shards is required"),
        ([*REQUIRED, "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
    ],
)
def test_mistakes_end_with_one_message_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(TrainSettings, "", arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_settings_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "run.yaml"
    for text, message in (("a: [1", "line 1"), ("- 1", "found a list"), ("sed: 1", "did you mean 'seed'")):
        file.write_text(text)
        with pytest.raises(SystemExit):
            parse(TrainSettings, "", [*REQUIRED, "--config", str(file)])
        error = capsys.readouterr().err
        assert message in error and "run.yaml" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("study run studies/quickstar.yaml", "does not exist (did you mean 'quickstart.yaml'?)"),
        ("study status studies/quickstart.yaml extra", "status takes no run, but got 'extra'"),
        (
            "train --train_shards README.md --output_dir OUT --config_name c",
            "README.md is a file; expected shards",
        ),
        ("train --train_shards s --output_dir README.md --config_name c", "README.md"),
        (
            "prepare_shards --tokenizer_name ./nowhere --output_dir OUT",
            "./nowhere does not exist; give a local",
        ),
        (
            "prepare_shards --tokenizer_name stories --num_problems 9 --output_dir README.md",
            "is a file; choose",
        ),
        ("plot_scaling docs", "docs holds no runs"),
        ("convert_checkpoint studies", "expected a checkpoint made by tools/train.py"),
    ],
)
def test_a_wrong_path_gives_one_message_with_a_remedy(arguments: str, message: str, tmp_path: Path) -> None:
    words = arguments.replace("OUT", str(tmp_path / "out")).split()
    command = [sys.executable, "-m", "trainer.commands", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    output = done.stdout + done.stderr
    assert done.returncode and message in output and "Traceback" not in output, done


@dataclass
class Renamed:
    heartbeat_seconds: int = setting(300, "seconds", old_names=("silence",))
    is_fast: bool = setting(False, "a switch", old_names=("fast", "quick"))
    seed: int = setting(0, "seed")


@pytest.fixture(autouse=True)
def no_warnings_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "_warned", set())


def test_the_earlier_name_of_a_flag_is_accepted_with_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert parse(Renamed, "", ["--silence", "5", "--quick"]) == Renamed(5, True)
    error = capsys.readouterr().err
    assert error.count("warning: flags: silence is now called heartbeat_seconds") == 1
    assert error.count("warning: flags: quick is now called is_fast") == 1
    with pytest.raises(SystemExit):
        parse(Renamed, "", ["--help"])
    assert "silence" not in capsys.readouterr().out


def test_only_rank_0_warns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("trainer.runtime.distributed.is_main_process", lambda: False)
    assert from_dict(Renamed, {"silence": 5}, "a.yaml") == Renamed(5)
    assert capsys.readouterr().err == ""


def test_a_flag_wins_over_the_file_under_either_name(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("silence: 5\nseed: 2\n")
    assert parse(Renamed, "", ["--config", str(file), "--heartbeat_seconds", "6"]) == Renamed(6, seed=2)
    file.write_text("heartbeat_seconds: 5\n")
    assert parse(Renamed, "", ["--config", str(file), "--silence", "6"]) == Renamed(6)


def test_a_setting_under_both_names_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="silence is the earlier name of heartbeat_seconds"):
        from_dict(Renamed, {"silence": 5, "heartbeat_seconds": 5}, "a.yaml")


def test_sections_of_a_study_may_use_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sections end up under the present name, so that merging them has no duplicate."""
    monkeypatch.setitem(checks.SET_BY_STUDY, Renamed, set())
    monkeypatch.setitem(checks._PLACEHOLDERS, Renamed, {})
    train, model = {"heartbeat_seconds": 5}, {"silence": 6}
    checks.check_settings(Renamed, train, "study.yaml: train")
    checks.check_settings(Renamed, model, "study.yaml: models.small")
    assert from_dict(Renamed, {**train, **model}, "study.yaml") == Renamed(6)
