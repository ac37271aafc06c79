"""The `deepspeed` command that started the ranks is killed; or the port where they would meet is taken."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import yaml

from tests.distributed import REPOSITORY
from tests.faults import oracle
from tests.faults.conftest import Case, printed, values_of
from trainer.runtime import distributed, process_group
from trainer.runtime.exit_codes import EXIT_REQUEUE
from trainer.shards.read import Shards

pytestmark = pytest.mark.faults

MARK = "FAULTS_LAUNCHED"
STEPS = 120  # for seconds: it is ended soon after its first
BOUNDED_SECONDS = (
    180.0  # a second until the loss is noticed, a step, a save; much more on a machine with other work
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, stories: Shards, gpt2_config: Path) -> Case:
    """A longer run, undisturbed, as its own reference."""
    folder = tmp_path_factory.mktemp("launched")
    changes = {"max_steps": STEPS, "save_steps": 1000, "save_total_limit": 1, "eval_steps": 0}
    case = Case(values_of(stories, gpt2_config, folder / "whole", 1, **changes), None)
    case.finish()
    return Case(case.values, oracle.Reference.of(case.values))


@contextlib.contextmanager
def launched(case: Case, port: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """`deepspeed --num_gpus 2 tools/train.py` in a process group of its own; at the end nobody of it is left."""
    bin_folder, file = Path(sys.executable).parent, case.run.path.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(case.values), encoding="utf-8")
    environment = distributed.without_launcher_variables(os.environ) | {
        MARK: str(case.run.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
    }  # fmt: skip
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(port or process_group.free_port())]
    command += ["tools/train.py", "--config", str(file)]
    with open(case.run.path.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for left in oracle.processes_with(MARK, str(case.run.path)):
            with contextlib.suppress(psutil.Error):
                left.kill()
        process.wait()


def _until(true: Callable[[], object], seconds: float, otherwise: str, case: Case) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        log = case.run.path.with_suffix(".log").read_text(errors="replace")
        assert time.monotonic() < deadline, f"{otherwise}\n{log[-3000:]}"
        time.sleep(0.02)


def _helper(command: psutil.Process) -> psutil.Process:
    """DeepSpeed's launch.py, between the command and the ranks."""
    return next(child for child in command.children() if "deepspeed.launcher.launch" in child.cmdline())


def _killed(case: Case, end: Callable[[psutil.Process], None]) -> None:
    """Launch, end it in the middle, and see everybody go, with a checkpoint of where they were; then go on."""
    with launched(case) as process:
        _until(lambda: case.run.metrics.exists() and case.run.metrics.stat().st_size, 300, "no step", case)
        end(psutil.Process(process.pid))
        _until(
            lambda: process.poll() is not None and not oracle.processes_with(MARK, str(case.run.path)),
            BOUNDED_SECONDS, "somebody is left", case,
        )  # fmt: skip
    (step,) = case.run.checkpoint_steps()
    assert 0 < step < STEPS
    assert oracle.leftovers(case.run) == []
    steps, _ = oracle.trajectory(case.run)
    assert max(steps) == step, "it did not save what it had done"
    said = case.finish()
    assert f"resumed from {case.run.checkpoint(step)}" in said
    assert case.reference is not None
    oracle.same(case.run, case.reference)


ENDS: dict[str, Callable[[psutil.Process], None]] = {
    "SIGKILL": lambda command: command.kill(),
    "SIGTERM": lambda command: command.terminate(),
    "SIGINT": lambda command: command.send_signal(signal.SIGINT),
    "SIGHUP to all: the terminal was closed": lambda command: os.killpg(command.pid, signal.SIGHUP),
    "Ctrl-C": lambda command: os.killpg(command.pid, signal.SIGINT),
    "SIGKILL to its helper": lambda command: _helper(command).kill(),
    "SIGUSR1 to its helper": lambda command: _helper(command).send_signal(signal.SIGUSR1),
}
FAST = {"SIGKILL"}


@pytest.mark.parametrize(
    "end", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ENDS]
)
def test_a_launcher_that_is_ended_leaves_nobody_and_loses_nothing(
    whole: Case, tmp_path: Path, end: str
) -> None:
    _killed(Case({**whole.values, "output_dir": str(tmp_path / "run")}, whole.reference), ENDS[end])


def test_all_are_told_while_one_is_not_at_work_yet(case: Callable[..., Case]) -> None:
    """It ends at once, for it has nothing to save; the other, which waits for it, says the same and not an error."""
    run = case(1)
    with run.start(late={"rank": 1, "seconds": 30}) as life:
        deadline = time.monotonic() + 120
        while not run.run.metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(1)  # rank 0 is at work, and waits
        life.kill(number=signal.SIGTERM)
        outcomes = life.wait()
    assert [outcome.status for outcome in outcomes] == [EXIT_REQUEUE, EXIT_REQUEUE], printed(outcomes)
    assert "stopped as asked (SIGTERM)" in outcomes[0].output, outcomes[0].output
    run.finish()
    run.same()


@pytest.mark.parametrize("listener", ["silent", "another training"])
def test_a_taken_port_is_told_on_every_rank(case: Callable[..., Case], listener: str) -> None:
    """Rank 0 says so at once; the others, whom no launcher ends here, after the time they were given to wait."""
    run = case(1, timeout_seconds=10)
    with contextlib.ExitStack() as stack:
        if listener == "silent":
            taken = stack.enter_context(socket.create_server(("0.0.0.0", 0)))
            port = taken.getsockname()[1]
        else:
            import torch.distributed as dist

            port = process_group.free_port()
            other = dist.TCPStore("127.0.0.1", port, 2, True, timedelta(seconds=60), wait_for_workers=False)
            stack.callback(lambda: other)  # it listens as long as it is held
        with run.start(environment={"MASTER_PORT": str(port)}) as life:
            first, second = life.wait()
    assert (first.status, second.status) == (2, 2), first.output + second.output
    assert f"another program listens at 127.0.0.1:{port}" in first.output and "--master_port" in first.output
    assert f"the 2 ranks did not meet at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT) in 10 s" in second.output
    assert not run.run.checkpoints.exists()


@pytest.mark.slow
def test_under_the_launcher_a_taken_port_ends_everybody_at_once(whole: Case, tmp_path: Path) -> None:
    """Although the ranks would wait for minutes (timeout_seconds)."""
    case = Case(
        {**whole.values, "output_dir": str(tmp_path / "run"), "timeout_seconds": 1800}, whole.reference
    )
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with launched(case, port) as process:
            process.wait(timeout=BOUNDED_SECONDS)
            assert process.returncode != 0
            _until(lambda: not oracle.processes_with(MARK, str(case.run.path)), 60, "somebody is left", case)
    assert f"another program listens at 127.0.0.1:{port}" in case.run.path.with_suffix(".log").read_text()
