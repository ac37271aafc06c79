"""The study's command line with stand-in tools, but real processes, launchers and signals."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from trainer.storage.run_directory import StudyDirectory
from trainer.study import processes

SLEEPERS = {"sleepy": {"config_name": "stories-0.2m", "config_overrides": "sleep"}}
HAS_MPI = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) is not None
without_mpi = pytest.mark.skipif(not HAS_MPI, reason="this environment has no mpiexec")
LAUNCHERS = pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("mpiexec", marks=without_mpi)])


class Command:
    """`python tools/study.py ... tiny.yaml` in an empty folder."""

    def __init__(self, folder: Path, tools: Path, values: dict[str, Any]) -> None:
        self.folder, self.tools = folder, tools
        self.study = StudyDirectory(folder / "runs" / "tiny")
        self.write(values)

    def write(self, values: dict[str, Any]) -> None:
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def start(self, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(self.tools / "study.py"), flags[0], "tiny.yaml", *flags[1:]]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def __call__(self, *flags: str) -> tuple[int, str]:
        process = self.start(*flags)
        output, _ = process.communicate(timeout=600)
        return process.returncode, output

    def rank_files(self, name: str, count: int = 2) -> list[Path]:
        """Wait until `count` ranks have written their file."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = sorted(self.study.path.glob(f"*/{name}-*"))
            if len(found) == count:
                return found
            time.sleep(0.05)
        raise TimeoutError(
            f"{name} of {count} ranks; logs: {[p.read_text() for p in self.study.path.rglob('*.log')]}"
        )


@pytest.fixture
def command(tmp_path: Path, tools: Path, values: dict[str, Any]) -> Iterator[Command]:
    values |= {"launcher": "mpiexec" if HAS_MPI else "deepspeed"}
    command = Command(tmp_path, tools, values)
    yield command
    processes.end_processes(command.study, 0.0)


def test_a_study_runs_and_is_done(command: Command) -> None:
    status, output = command("run")
    assert status == 0, output
    lines = output.splitlines()
    assert lines[0] == "study tiny: 2 runs, 9 stages, 0 done"
    assert lines[1].startswith("[1/9] prepare stories-train: 30 problems (")
    assert lines[3].startswith("[3/9] train stories.answer_only.small.s0: loss 1.500 (")
    assert lines[4].startswith("[4/9] convert stories.answer_only.small.s0: 1 kB (")
    assert lines[5].startswith(
        "[5/9] evaluate stories.answer_only.small.s0 on stories-test: 66.7% [48.8, 80.8] ("
    )
    assert lines[9].startswith("[9/9] report tiny: done (")
    assert lines[10:] == ["Steps help.", "report: runs/tiny/report/index.html"]
    log = command.study.run("stories.cot.small.s0").log("train").read_text()
    assert log.startswith("=== 20") and "tools/train.py" in log.splitlines()[0]
    assert log.count("a line before the end") == 2
    assert not command.study.lock.exists()

    status, output = command("run")
    assert (status, output.splitlines()) == (
        0,
        ["study tiny: 2 runs, 9 stages, 9 done", "Steps help.", "report: runs/tiny/report/index.html"],
    )


def test_a_dry_run_shows_commands_and_starts_nothing(command: Command) -> None:
    status, output = command("run", "--dry_run")
    assert status == 0
    assert "study tiny: 2 runs, 9 stages, 9 to do" in output
    rows = [line.split() for line in output.splitlines()]
    assert ["small", "stories-0.2m", "(random", "weights)", "190,720", "2", "zero1", "fp32"] in rows
    assert ["3", "train", "stories.answer_only.small.s0", "to", "do", "2", "300"] in rows
    assert output.count("tools/train.py --train_shards=shards/stories-train") == 2
    assert not (command.folder / "runs").exists() and not (command.folder / "shards").exists()
    command("run")
    shutil.rmtree(command.study.run("stories.cot.small.s0").path)
    status, output = command("run", "--dry_run")
    assert "9 stages, 3 to do" in output, output
    assert "answer_only" not in output.split("to do\n")[-1]


def test_status_shows_every_run(command: Command) -> None:
    assert "0 of 9 stages done" in command("status")[1]
    command("run")
    cot = command.study.run("stories.cot.small.s0")
    shutil.rmtree(cot.path)
    cot.path.mkdir()
    cot.metrics.write_text('{"step": 1, "loss": 3.25}\n')
    status, output = command("status")
    assert status == 0
    assert "6 of 9 stages done" in output
    rows = {row[0]: row[1:] for row in map(str.split, output.splitlines()) if row}
    assert rows["stories.answer_only.small.s0"] == ["done", "1.500", "done", "66.7%", "[48.8,", "80.8]"]
    assert rows["stories.cot.small.s0"] == ["1/2", "3.250", "-", "-"]


def test_a_failure_shows_stage_exit_code_log_and_its_end(command: Command, values: dict[str, Any]) -> None:
    bad = {"config_name": "stories-0.2m", "config_overrides": "exit=1"}
    values["models"] = {"bad": bad, **values["models"]}
    command.write(values)
    status, output = command("run")
    assert status == 2
    log = "runs/tiny/stories.answer_only.bad.s0/logs/train.log"
    assert f"error: train stories.answer_only.bad.s0 failed with exit code 1; log: {log}\n" in output
    assert "  | a line before the end\n" in output
    assert "  | error: the learning rate is cursed\n" in output
    assert "===" not in output
    assert "small" not in output, "it stops at the first failure"
    assert processes.processes_of_study(command.study) == []

    status, output = command("run", "--keep_going")
    assert status == 2
    assert (
        "error: 2 of 15 stages failed: train stories.answer_only.bad.s0; train stories.cot.bad.s0" in output
    )
    assert output.count("evaluate stories.cot.small.s0") == 1
    assert "convert stories.cot.bad.s0" not in output
    assert "report tiny: done" in output


def test_a_stage_that_ends_early_is_not_done(command: Command, values: dict[str, Any]) -> None:
    values["models"]["small"]["config_overrides"] = "early"
    command.write(values)
    status, output = command("run")
    assert status == 2
    assert "train stories.answer_only.small.s0 ended without an error, but is not finished" in output


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("deepspeed", signal.SIGINT),
        pytest.param("mpiexec", signal.SIGINT, marks=without_mpi),
        pytest.param("mpiexec", signal.SIGTERM, marks=without_mpi),
    ],
)
def test_after_an_interrupt_ranks_save_and_no_process_is_left(
    command: Command, values: dict[str, Any], launcher: str, number: signal.Signals
) -> None:
    """SIGTERM to the deepspeed command leaves its ranks; mpiexec gives every rank a session of its own."""
    command.write({**values, "models": SLEEPERS, "launcher": launcher})
    process = command.start("run")
    command.rank_files("pid")
    assert len(processes.processes_of_study(command.study)) >= 3
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; run the same command to continue" in output
    assert "Traceback" not in output
    assert len(command.rank_files("saved")) == 2
    assert_no_process_is_left(command)
    assert not command.study.lock.exists()

    command.write({**values, "models": {"sleepy": {"config_name": "stories-0.2m"}}})
    status, output = command("run")  # no checkpoint was published, so the settings may change
    assert status == 0, output


def test_a_second_interrupt_kills_ranks_that_ignore_the_first(
    command: Command, values: dict[str, Any]
) -> None:
    command.write({**values, "models": {"deaf": {"config_name": "stories-0.2m", "config_overrides": "deaf"}}})
    process = command.start("run")
    command.rank_files("pid")
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None, "it waits for them to save"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130
    assert_no_process_is_left(command)


def test_ranks_of_a_killed_study_are_ended_by_the_next(command: Command, values: dict[str, Any]) -> None:
    command.write({**values, "models": SLEEPERS})
    process = command.start("run")
    command.rank_files("pid")
    process.kill()
    process.communicate()
    orphans = {p.pid for p in processes.processes_of_study(command.study)}
    assert len(orphans) >= 2
    assert "of an earlier start are alive; a run ends them" in command("status")[1]

    command.write({**values, "models": {"sleepy": {"config_name": "stories-0.2m"}}})
    status, output = command("run")
    assert status == 0, output
    assert "left over from an earlier start that was killed" in output
    assert len(command.rank_files("saved")) == 2
    assert_no_process_is_left(command)


@LAUNCHERS
def test_a_killed_rank_is_a_failure_and_the_others_are_ended(
    command: Command, values: dict[str, Any], launcher: str
) -> None:
    command.write({**values, "models": SLEEPERS, "launcher": launcher})
    process = command.start("run")
    victim, _ = command.rank_files("pid")
    os.kill(int(victim.read_text()), signal.SIGKILL)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "train stories.answer_only.sleepy.s0 failed with exit code" in output
    assert "(SIGKILL: out of memory?)" in output or "Killed (signal 9)" in output  # the message of mpiexec
    assert_no_process_is_left(command)


def test_two_processes_do_not_run_one_study(command: Command, values: dict[str, Any]) -> None:
    command.write({**values, "models": SLEEPERS})
    process = command.start("run")
    command.rank_files("pid")
    status, output = command("run")
    assert status == 2
    in_use = rf"in use: host \S+, pid {process.pid}, since "
    assert re.search(in_use, output) and re.search(in_use, command("status")[1])
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)


def test_a_study_inside_an_allocation_ignores_its_rank_variables(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    status, output = command("run")
    assert status == 0, output


def test_status_needs_no_torch(command: Command) -> None:
    code = "import sys; sys.argv[1:] = ['status', 'tiny.yaml']; from trainer.commands import study; study.main(); assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": f"{command.tools}:{os.environ['PYTHONPATH']}"}
    subprocess.run([sys.executable, "-c", code], cwd=command.folder, env=environment, check=True)


def assert_no_process_is_left(command: Command) -> None:
    """Check the environment variables of all processes, and the pid files of the ranks."""
    assert processes.processes_of_study(command.study) == []
    for path in command.study.path.glob("*/pid-*"):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie that init has not reaped yet
            assert psutil.Process(int(path.read_text())).status() == psutil.STATUS_ZOMBIE
