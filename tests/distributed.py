"""Run a command as N ranks in real processes, with the environment that torchrun and deepspeed set."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from trainer.runtime.process_group import free_port

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass
class Outcome:
    """Exit status of one rank (negative: the signal that killed it) and its output."""

    status: int
    output: str


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return the environment variables that a launcher sets for one of `num_ranks` ranks on this machine."""
    ours = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    return ours | {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


class Ranks:
    """N running processes of one command (the arguments of `python`); context manager that kills them on exit."""

    def __init__(self, arguments: list[str], num_ranks: int, environment: dict[str, str] | None = None):
        port = free_port()
        self.processes = []
        for rank in range(num_ranks):
            ours = rank_environment(rank, num_ranks, port)
            ours |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=REPOSITORY,
                    env={**os.environ, **ours, **(environment or {})},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, number)

    def wait(self, timeout: float = 180.0) -> list[Outcome]:
        """Wait for all ranks; on a timeout kill them and fail with the output of one that was still running."""
        deadline = time.monotonic() + timeout
        outcomes = []
        for process in self.processes:
            try:
                output, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill()
                output, _ = process.communicate()
                raise AssertionError(f"still running after {timeout} s; printed:\n{output[-3000:]}") from None
            outcomes.append(Outcome(process.returncode, output))
        return outcomes


def run(
    arguments: list[str], num_ranks: int = 1, timeout: float = 180.0, **environment: str
) -> list[Outcome]:
    """Run a command on N ranks and return their outcomes."""
    with Ranks(arguments, num_ranks, environment) as ranks:
        return ranks.wait(timeout)


def run_well(arguments: list[str], num_ranks: int = 1, timeout: float = 180.0, **environment: str) -> str:
    """Run a command on N ranks, each of which must exit with 0, and return the output of rank 0."""
    outcomes = run(arguments, num_ranks, timeout, **environment)
    failed = [outcome.output[-3000:] for outcome in outcomes if outcome.status != 0]
    assert not failed, "\n".join(failed)
    return outcomes[0].output
