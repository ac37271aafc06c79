"""Every tool answers --help at once and teaches; flags win over the file; a wrong word is met with the right one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.command_line import parse
from trainer.settings import PlotSettings, TrainSettings

ROOT = Path(__file__).parents[2]
TOOLS = sorted(set((ROOT / "tools").glob("*.py")) - {ROOT / "tools" / "command_line.py"})
REQUIRED = ["--train_shards", "s", "--output_dir", "o", "--config_name", "c"]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_help_teaches_and_imports_nothing_heavy(tool: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(tool), "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "python tools/" in done.stdout or "deepspeed" in done.stdout  # an example to copy
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "deepspeed", "numpy", "datasets"}


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_tools_are_thin(tool: Path) -> None:
    assert len(tool.read_text(encoding="utf-8").splitlines()) <= 60


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
        ([*REQUIRED, "--max_step", "3"], "unrecognized arguments: --max_step"),
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
