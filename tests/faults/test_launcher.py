"""The `deepspeed` command that started the ranks is ended, or the rendezvous port is taken."""

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
STEPS = 120  # some seconds: the launcher is ended soon after the first
# A second until the ranks notice, a step and a save take less, but not on a busy machine.
BOUNDED_SECONDS = 180.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, stories: Shards, gpt2_config: Path) -> Case:
    """A longer undisturbed run and its reference."""
    folder = tmp_path_factory.mktemp("launched")
    changes = {"max_steps": STEPS, "save_steps": 1000, "save_total_limit": 1, "eval_steps": 0}
    case = Case(values_of(stories, gpt2_config, folder / "whole", 1, **changes), None)
    case.finish()
    return Case(case.values, oracle.Reference.from_run(case.values))


@contextlib.contextmanager
def launched(case: Case, port: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """Context manager that runs `deepspeed --num_gpus 2 tools/train.py` in its own process group, killed at the end."""
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
        for left in oracle.find_processes(MARK, str(case.run.path)):
            with contextlib.suppress(psutil.Error):
                left.kill()
        process.wait()


def _wait_until(condition: Callable[[], object], seconds: float, error: str, case: Case) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        log = case.run.path.with_suffix(".log").read_text(errors="replace")
        assert time.monotonic() < deadline, f"{error}\n{log[-3000:]}"
        time.sleep(0.02)


def _helper(command: psutil.Process) -> psutil.Process:
    """Return the process of DeepSpeed's launch.py, between the command and the ranks."""
    return next(child for child in command.children() if "deepspeed.launcher.launch" in child.cmdline())


def _end_launcher(case: Case, end: Callable[[psutil.Process], None]) -> None:
    """End the launcher of a run; check that all ranks save and exit, and that the resumed run equals the reference."""
    with launched(case) as process:
        _wait_until(
            lambda: case.run.metrics.exists() and case.run.metrics.stat().st_size, 300, "no step", case
        )
        end(psutil.Process(process.pid))
        _wait_until(
            lambda: process.poll() is not None and not oracle.find_processes(MARK, str(case.run.path)),
            BOUNDED_SECONDS, "processes are left", case,
        )  # fmt: skip
    (step,) = case.run.checkpoint_steps()
    assert 0 < step < STEPS
    assert oracle.leftovers(case.run) == []
    steps, _ = oracle.trajectory(case.run)
    assert max(steps) == step, "the last step was not saved"
    output = case.finish()
    assert f"resumed from {case.run.checkpoint(step)}" in output
    assert case.reference is not None
    oracle.assert_same(case.run, case.reference)


ENDS: dict[str, Callable[[psutil.Process], None]] = {
    "SIGKILL": lambda command: command.kill(),
    "SIGTERM": lambda command: command.terminate(),
    "SIGINT": lambda command: command.send_signal(signal.SIGINT),
    "SIGHUP to all (terminal closed)": lambda command: os.killpg(command.pid, signal.SIGHUP),
    "Ctrl-C": lambda command: os.killpg(command.pid, signal.SIGINT),
    "SIGKILL to its helper": lambda command: _helper(command).kill(),
    "SIGUSR1 to its helper": lambda command: _helper(command).send_signal(signal.SIGUSR1),
}
FAST = {"SIGKILL"}


@pytest.mark.parametrize(
    "end", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ENDS]
)
def test_ranks_save_and_exit_when_the_launcher_ends(whole: Case, tmp_path: Path, end: str) -> None:
    _end_launcher(Case({**whole.values, "output_dir": str(tmp_path / "run")}, whole.reference), ENDS[end])


def test_a_signal_while_one_rank_has_not_begun_training(make_case: Callable[..., Case]) -> None:
    """That rank exits immediately, having nothing to save; the other, waiting for it, reports the stop and no error."""
    case = make_case(1)
    with case.start(late={"rank": 1, "seconds": 30}) as ranks:
        deadline = time.monotonic() + 120
        while not case.run.metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(1)  # rank 0 is training, and waits for rank 1
        ranks.kill(number=signal.SIGTERM)
        outcomes = ranks.wait()
    assert [outcome.status for outcome in outcomes] == [EXIT_REQUEUE, EXIT_REQUEUE], printed(outcomes)
    assert "stopped as asked (SIGTERM)" in outcomes[0].output, outcomes[0].output
    case.finish()
    case.assert_same()


@pytest.mark.parametrize("listener", ["silent", "another training"])
def test_a_taken_port_is_reported_on_every_rank(make_case: Callable[..., Case], listener: str) -> None:
    """Rank 0 reports it immediately; the others, without a launcher that ends them, after `timeout_seconds`."""
    case = make_case(1, timeout_seconds=10)
    with contextlib.ExitStack() as stack:
        if listener == "silent":
            taken = stack.enter_context(socket.create_server(("0.0.0.0", 0)))
            port = taken.getsockname()[1]
        else:
            import torch.distributed as dist

            port = process_group.free_port()
            other = dist.TCPStore("127.0.0.1", port, 2, True, timedelta(seconds=60), wait_for_workers=False)
            stack.callback(lambda: other)  # keeps the store listening
        with case.start(environment={"MASTER_PORT": str(port)}) as ranks:
            first, second = ranks.wait()
    assert (first.status, second.status) == (2, 2), first.output + second.output
    assert f"another program listens at 127.0.0.1:{port}" in first.output and "--master_port" in first.output
    assert f"the 2 ranks did not meet at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT) in 10 s" in second.output
    assert not case.run.checkpoints.exists()


@pytest.mark.slow
def test_under_the_launcher_a_taken_port_ends_all_ranks(whole: Case, tmp_path: Path) -> None:
    """Without waiting for `timeout_seconds`."""
    case = Case(
        {**whole.values, "output_dir": str(tmp_path / "run"), "timeout_seconds": 1800}, whole.reference
    )
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with launched(case, port) as process:
            process.wait(timeout=BOUNDED_SECONDS)
            assert process.returncode != 0
            _wait_until(
                lambda: not oracle.find_processes(MARK, str(case.run.path)), 60, "processes are left", case
            )
    assert f"another program listens at 127.0.0.1:{port}" in case.run.path.with_suffix(".log").read_text()
