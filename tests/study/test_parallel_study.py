"""Parallel stages, with stand-in tools that wait for each other, so that no test depends on speed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tests.study.test_study_run import Command, assert_no_process_is_left
from trainer.storage import atomic_dir
from trainer.storage.run_directory import StudyDirectory
from trainer.study import processes, stages
from trainer.study.study_file import load_study

PARALLEL = ("run", "--num_parallel", "2")


@pytest.fixture
def command(tmp_path: Path, tools: Path, values: dict[str, Any]) -> Iterator[Command]:
    """Return the command line of a study with one method and one rank (no launcher)."""
    values |= {"num_ranks": 1, "methods": ["cot"]}
    command = Command(tmp_path, tools, values)
    yield command
    processes.end_processes(command.study, 0.0)


def models(**behaviours: str) -> dict[str, Any]:
    return {
        name: {"config_name": "stories-0.2m", "config_overrides": behaviour}
        for name, behaviour in behaviours.items()
    }


def lines_until(text: str, output: IO[str] | None) -> list[str]:
    """Return the lines up to the first that contains `text`."""
    assert output is not None
    lines: list[str] = []
    while not lines or text not in lines[-1]:
        line = output.readline()
        assert line, f"no line with {text!r} in {lines}"
        lines.append(line)
    return lines


def events(command: Command) -> list[tuple[str, str]]:
    """Return ("start" or "end", label of the stage) in the order of the events."""
    lines = (command.folder / "events.txt").read_text().splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def max_at_a_time(found: list[tuple[str, str]]) -> int:
    running = maximum = 0
    for event, _ in found:
        running += 1 if event == "start" else -1
        maximum = max(maximum, running)
    return maximum


@pytest.mark.parametrize("num_parallel", [2, 3])
def test_independent_stages_overlap_and_dependent_ones_never_do(
    command: Command, values: dict[str, Any], num_parallel: int
) -> None:
    """The trainings end only when `num_parallel` of them run at the same time."""
    meet = f"meet={num_parallel}"
    values["models"] = models(a=meet, b=meet, c=meet, d=meet)
    command.write({**values, "num_parallel": num_parallel})
    status, output = command("run")
    assert status == 0, output
    first, *results = output.splitlines()
    assert first == f"study tiny: 4 runs, 15 stages, 0 done, {num_parallel} at a time"
    assert sum("loss 1.500" in line for line in results) == 4
    assert results[15:] == ["Steps help.", "report: runs/tiny/report/index.html"]

    found = events(command)
    assert max_at_a_time(found) == num_parallel
    todo = stages.study_stages(load_study(values, Path("tiny.yaml")))
    for stage in todo:
        for need in stage.needs:
            assert found.index(("end", need)) < found.index(("start", stage.label))
    assert found[-2:] == [("start", "report tiny"), ("end", "report tiny")]


def test_the_default_is_one_stage_at_a_time(command: Command, values: dict[str, Any]) -> None:
    values["models"] = models(a="", b="")
    command.write(values)
    status, output = command("run")
    assert status == 0, output
    assert [line.split("]")[0] for line in output.splitlines()[1:10]] == [f"[{n}/9" for n in range(1, 10)]
    assert max_at_a_time(events(command)) == 1


def test_after_a_failure_the_others_end_and_nothing_new_is_started(
    command: Command, values: dict[str, Any]
) -> None:
    """Only processes of the failed stage are ended: `good` runs until its file exists."""
    values["models"] = models(good="until=go", bad="orphan", third="")
    command.write(values)
    process = command.start(*PARALLEL)
    lines_until("train stories.cot.bad.s0 failed with exit code 1; log: ", process.stdout)
    lines_until("nothing new is started; waiting for train stories.cot.good.s0", process.stdout)
    assert processes.processes_of_study(command.study, "train stories.cot.bad.s0") == []
    assert len(processes.processes_of_study(command.study, "train stories.cot.good.s0")) == 1
    (command.folder / "go").touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    log, error = output.split("error: ", 1)
    assert "train stories.cot.good.s0: loss 1.500" in log
    assert error.startswith("train stories.cot.bad.s0 failed with exit code 1; log: runs/tiny/")
    assert not any("third" in label or "convert" in label for _, label in events(command))
    (orphan,) = command.study.path.glob("*/pid-orphan")
    assert_no_process_is_left(command)
    assert orphan.is_file() and not command.study.lock.exists()


def test_all_failures_are_reported(command: Command, values: dict[str, Any]) -> None:
    values["models"] = models(a="until=go", b="orphan")
    command.write(values)
    process = command.start(*PARALLEL)
    lines_until("waiting for train stories.cot.a.s0", process.stdout)
    (started,) = command.study.path.glob("*/started")
    for found in processes.processes_of_study(command.study, "train stories.cot.a.s0"):
        found.kill()
    output, _ = process.communicate(timeout=60)
    assert started.is_file() and process.returncode == 2
    error = output.split("error: ", 1)[1]
    assert "train stories.cot.b.s0 failed with exit code 1;" in error
    assert "train stories.cot.a.s0 failed with exit code -9 (SIGKILL: out of memory?);" in error


def test_keep_going_starts_new_ones_beside_those_that_run(command: Command, values: dict[str, Any]) -> None:
    values["models"] = models(good="until=go", bad="orphan", third="")
    command.write(values)
    process = command.start(*PARALLEL, "--keep_going")
    lines_until("train stories.cot.bad.s0 failed with exit code 1", process.stdout)
    lines_until("evaluate stories.cot.third.s0 on stories-test: 66.7%", process.stdout)
    (command.folder / "go").touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "evaluate stories.cot.good.s0 on stories-test: 66.7%" in output
    assert "[10/12] report tiny: done" in output
    assert output.splitlines()[-1] == "error: 1 of 12 stages failed: train stories.cot.bad.s0"
    assert not any("convert stories.cot.bad" in label for _, label in events(command))


def test_an_interrupt_lets_all_save_at_the_same_time(command: Command, values: dict[str, Any]) -> None:
    """Two ranks under the deepspeed launcher and one process: each ends only when all three have received the signal."""
    values["models"] = models(ranks="sleep=3", alone="sleep=3")
    values["models"]["ranks"]["num_ranks"] = 2
    command.write(values)
    process = command.start("run", "--num_parallel", "3")  # three ranks at a time
    command.rank_files("pid", 3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=50)
    assert process.returncode == 130
    running = "train stories.cot.ranks.s0, train stories.cot.alone.s0"
    assert f"ending {running}; Ctrl-C once more ends them without saving" in output
    assert output.splitlines()[-1] == "interrupted; run the same command to continue"
    assert len(command.rank_files("together", 3)) == 3
    assert_no_process_is_left(command)
    assert not command.study.lock.exists()


def test_a_second_interrupt_kills_stages_that_ignore_the_first(
    command: Command, values: dict[str, Any]
) -> None:
    values["models"] = models(a="deaf", b="deaf")
    command.write(values)
    process = command.start(*PARALLEL)
    command.rank_files("pid")
    process.send_signal(signal.SIGINT)
    lines_until("Ctrl-C once more", process.stdout)
    assert len(processes.processes_of_study(command.study)) == 2, "it waits for them to save"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert_no_process_is_left(command)


@pytest.mark.parametrize(("visible", "expected"), [("2,5", {"2", "5"}), ("7", {"7"}), ("", {""})])
def test_trainings_beside_each_other_share_cores_and_devices(
    command: Command,
    values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    visible: str,
    expected: set[str],
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    values["models"] = models(a="meet=2", b="meet=2")
    command.write(values)
    status, output = command(*PARALLEL)
    assert status == 0, output
    found = []
    for name in ("a", "b"):
        run = command.study.run(f"stories.cot.{name}.s0")
        facts = atomic_dir.read_manifest(run.checkpoint(2), "checkpoint")["facts"]
        found.append(facts["environment"])
        header = run.log("train").read_text().splitlines()[0]
        assert (f"CUDA_VISIBLE_DEVICES={found[-1]['CUDA_VISIBLE_DEVICES']} " in header) == bool(visible)
    assert {environment["CUDA_VISIBLE_DEVICES"] for environment in found} == expected
    cores = len(os.sched_getaffinity(0))
    assert {environment["OMP_NUM_THREADS"] for environment in found} == {str(max(1, cores // 2))}


@pytest.mark.parametrize("given", ["-1", "some"])
def test_a_wrong_number_is_refused(command: Command, given: str) -> None:
    status, output = command("run", "--num_parallel", given)
    assert status == 2
    assert f"num_parallel is {given}" in output or f"invalid int value: '{given}'" in output
    assert not command.study.path.exists()


def test_the_number_is_no_change_of_a_study(command: Command, values: dict[str, Any]) -> None:
    assert command("run")[0] == 0
    command.write({**values, "num_parallel": 8})
    status, output = command("run")
    assert (status, output.splitlines()[0]) == (0, "study tiny: 1 runs, 6 stages, 6 done, 8 at a time")
    assert "parallel" not in command.study.settings.read_text()


def test_one_stage_is_ended_and_then_all(tmp_path: Path) -> None:
    study = StudyDirectory(tmp_path)
    sleep = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(300)"]
    logs = {name: tmp_path / f"{name}.log" for name in ("a", "b", "c")}
    children = {name: processes.start_process(sleep, study, name, log, {}) for name, log in logs.items()}
    deadline = time.monotonic() + 30
    while not all(log.read_text() for log in logs.values()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert processes.end_processes(study, 30.0, stage="b") == []
    found = {name: child.poll() for name, child in children.items()}
    assert found == {"a": None, "b": -signal.SIGTERM, "c": None}
    assert processes.end_processes(study, 30.0) == []
    assert {child.wait(timeout=5) for child in children.values()} == {-signal.SIGTERM}


def test_help_names_the_flag(command: Command) -> None:
    study = [sys.executable, str(command.tools / "study.py"), "--help"]
    text = subprocess.run(study, capture_output=True, text=True, check=True).stdout
    assert "--num_parallel" in text and "concurrent stages" in text
