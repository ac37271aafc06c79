"""Ctrl-C ends every tool with one line: alone and under launchers, while it imports, works or saves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import REPOSITORY
from trainer.runtime.distributed import without_launcher_variables
from trainer.runtime.exit_codes import EXIT_INTERRUPTED, EXIT_REQUEUE
from trainer.runtime.terminal import INTERRUPTED
from trainer.settings import ConvertSettings, PrepareSettings
from trainer.shards.prepare import prepare
from trainer.storage.run_directory import EvaluationDirectory, RunDirectory

MPIEXEC = Path(sys.executable).with_name("mpiexec")
without_mpi = pytest.mark.skipif(not MPIEXEC.exists(), reason="this environment has no mpiexec")


def interrupt(
    command: list[str], is_time: Callable[[float], object], program: str = "python"
) -> tuple[int, list[str]]:
    """Run a tool, send SIGINT to its process group when `is_time(seconds since start)`, return status and lines."""
    prefix = [str(MPIEXEC), "-n", "2"] if program == "mpiexec" else []
    process = subprocess.Popen(
        [*prefix, sys.executable, *command],
        cwd=REPOSITORY,
        env=without_launcher_variables(os.environ) | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    start = time.monotonic()
    try:
        while not is_time(time.monotonic() - start):
            assert process.poll() is None and time.monotonic() < start + 120, process.communicate()[0]
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    # DeepSpeed warns at its import if there is no GPU, and mpiexec reports the signal.
    launcher_line = re.compile(r"^\[.*real_accelerator.py|^\[mpiexec")
    return process.returncode, [line for line in output.splitlines() if not launcher_line.search(line)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards") / "stories"
    prepare(PrepareSettings(tokenizer_name="stories", num_problems=60, output_dir=str(folder)))
    return str(folder)


@pytest.fixture
def train(shards: str, tmp_path: Path) -> list[str]:
    """A training that ends after many minutes, into `tmp_path / "run"`."""
    flags = ["--config_name=stories-0.2m", "--max_steps=100000", f"--output_dir={tmp_path / 'run'}"]
    return ["tools/train.py", f"--train_shards={shards}", *flags]


def steps(run: RunDirectory) -> list[dict[str, Any]]:
    lines = run.metrics.read_text().splitlines(keepends=True) if run.metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.mark.parametrize(
    "tool", ["annotate", "train", "evaluate", "prepare_shards", "convert_checkpoint", "plot_scaling"]
)
def test_while_a_tool_starts(tool: str) -> None:
    """The signal is sent as soon as Python reports that the tool's module has imported argparse."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", f"tools/{tool}.py"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    imported = iter(process.stdout.readline, "")
    assert any(line.rpartition("|")[2].strip() == "argparse" for line in imported)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    lines = [line for line in output.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, lines) == (EXIT_INTERRUPTED, [INTERRUPTED])


def test_while_a_training_imports_torch(train: list[str], tmp_path: Path) -> None:
    log = tmp_path / "run" / "logs" / "train.rank0.log"

    def is_importing(_: float) -> bool:
        return log.exists() and re.search(r"\| +numpy\n", log.read_text()) is not None

    status, lines = interrupt(["-X", "importtime", *train], is_importing)
    lines = [line for line in lines if not line.startswith("import time:")]
    assert (status, lines) == (EXIT_INTERRUPTED, [INTERRUPTED])


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("python", []),
        ("python", ["--num_gpus=2"]),
        pytest.param("mpiexec", [], marks=[without_mpi, pytest.mark.slow]),
    ],
    ids=["alone", "num_gpus", "mpiexec"],
)
def test_a_training_saves_and_shows_its_whole_time(
    train: list[str], tmp_path: Path, program: str, flags: list[str]
) -> None:
    run = RunDirectory(tmp_path / "run")
    status, lines = interrupt([*train, *flags], lambda _: steps(run), program)
    assert status == EXIT_REQUEUE, lines
    first = steps(run)
    step = first[-1]["step"]
    assert lines[-1] == (
        f"{run.path}: interrupted at step {step}/100000; checkpoint of step {step} saved; run the same command to resume"
    )
    assert not any("Traceback" in line for line in lines)
    assert run.checkpoint_steps() == [step]

    status, lines = interrupt([*train, *flags], lambda _: len(steps(run)) > len(first), program)
    assert status == EXIT_REQUEUE and f"resumed from {run.checkpoint(step)}" in lines, lines
    again = steps(run)[len(first)]
    assert again["step"] == step + 1
    # The second start took seconds before its first step, too.
    assert again["run_seconds"] > first[-1]["run_seconds"] + again["seconds"] + 0.5


def test_a_training_that_saves(train: list[str], tmp_path: Path) -> None:
    """Every step is followed by a save, so the signal arrives in the save or directly before it."""
    run = RunDirectory(tmp_path / "run")
    status, lines = interrupt([*train, "--save_steps=1"], lambda _: list(run.checkpoints.glob(".step-*.tmp")))
    assert status == EXIT_REQUEUE, lines
    assert run.checkpoint_steps()[-1] == steps(run)[-1]["step"]
    assert not list(run.checkpoints.glob(".*"))
    assert "Traceback" not in "\n".join(lines) and "interrupted at step" in lines[-1]


def test_ranks_that_have_not_started(train: list[str], tmp_path: Path) -> None:
    """The deepspeed command is still importing."""
    assert interrupt([*train, "--num_gpus=2"], lambda seconds: seconds > 1.5) == (
        EXIT_INTERRUPTED,
        [INTERRUPTED],
    )
    assert not (tmp_path / "run").exists()


def test_num_gpus_under_a_launcher_is_an_error(train: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *train, "--num_gpus=2"],
        cwd=REPOSITORY,
        env=os.environ | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert (
        done.stderr == "error: num_gpus: a launcher has already started this process; leave --num_gpus out\n"
    )


def test_problems_that_are_tokenised(tmp_path: Path) -> None:
    """The temporary folder is removed."""
    folder = tmp_path / "shards"
    folder.mkdir()
    out = ["--num_problems=100000", f"--output_dir={folder / 'stories'}"]
    command = ["tools/prepare_shards.py", "--tokenizer_name=stories", *out]
    assert interrupt(command, lambda _: list(folder.glob(".*/problems.jsonl"))) == (
        EXIT_INTERRUPTED,
        [INTERRUPTED],
    )
    assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def export(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model: it writes until it has no tokens left."""
    from trainer.export.convert import convert

    run = tmp_path_factory.mktemp("run")
    command = ["tools/train.py", f"--train_shards={shards}", "--config_name=stories-0.2m", "--max_steps=1"]
    subprocess.run([sys.executable, *command, f"--output_dir={run}"], cwd=REPOSITORY, check=True, timeout=120)
    return convert(ConvertSettings(str(run)))


@pytest.mark.parametrize(
    ("program", "flags"),
    [("python", []), ("python", ["--num_gpus=2"]), pytest.param("mpiexec", [], marks=without_mpi)],
    ids=["alone", "num_gpus", "mpiexec"],
)
def test_an_evaluation_keeps_its_answers(
    shards: str, export: Path, tmp_path: Path, program: str, flags: list[str]
) -> None:
    directory = EvaluationDirectory(tmp_path)
    command = ["tools/evaluate.py", f"--model_name_or_path={export}", f"--shards={shards}"]
    command += [f"--output_dir={tmp_path}", "--max_new_tokens=600", "--batch_size=1"]

    def num_answers() -> int:
        return sum(file.read_text().count("\n") for file in directory.rank_files.glob("*.jsonl"))

    status, lines = interrupt([*command, *flags], lambda _: num_answers(), program)
    assert (status, lines[-1]) == (EXIT_INTERRUPTED, INTERRUPTED), lines
    assert lines.count(INTERRUPTED) == 1 and len(lines) == 2
    assert 1 <= num_answers() < 60 and not directory.results.exists()
