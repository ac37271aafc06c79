"""Ranks forked from a server that has done the imports, which then run the real command from its first line.

Twelve of the thirteen seconds a training takes to start are imports, which write nothing; without them hundreds of kills
are affordable. Otherwise a forked rank is like a user's: its own environment and session, `tools/train.py` (or another
tool) run as `__main__` with its flags, its output in a file.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.distributed import REPOSITORY, Outcome
from trainer.runtime.distributed import without_launcher_variables
from trainer.runtime.process_group import free_port

TRAIN = "tools/train.py"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.imports"])


def _run_rank(command: list[str], environment: dict[str, str], output: str, injected: str) -> None:
    """Run the command as one rank, in the forked process."""
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    if injected:
        from tests.faults import injection

        injection.arm(injected)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


@dataclass
class ForkedRanks:
    """All ranks of one start of the command; a context manager that kills the remaining ones at its end."""

    processes: list[BaseProcess]
    outputs: list[Path]

    def __enter__(self) -> ForkedRanks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        for process in self.processes:
            process.join()

    def kill(self, ranks: Sequence[int] | None = None, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to some ranks (default: all) unless they have ended."""
        for rank, process in enumerate(self.processes):
            if (ranks is None or rank in ranks) and process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid or 0, number)

    @property
    def statuses(self) -> list[int | None]:
        """Return the exit status of every rank (negative: the signal that killed it), None while it runs."""
        return [process.exitcode for process in self.processes]

    def wait(self, seconds: float = 180.0) -> list[Outcome]:
        """Wait for all ranks. Raises AssertionError, with their output, if one still runs after `seconds`."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        printed = [
            path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            for path in self.outputs
        ]
        late = [rank for rank, status in enumerate(self.statuses) if status is None]
        assert not late, f"ranks {late} still run after {seconds} s; printed:\n" + "\n".join(
            text[-3000:] for text in printed
        )
        return [
            Outcome(int(process.exitcode or 0), text)
            for process, text in zip(self.processes, printed, strict=True)
        ]


def start(
    arguments: Sequence[str],
    num_ranks: int,
    logs: Path,
    injected: str = "",
    last_rank_flags: Sequence[str] = (),
    command: str = TRAIN,
    **environment: str,
) -> ForkedRanks:
    """Start the command on `num_ranks` ranks. `injected`: faults for injection.py (JSON) or ""."""
    base = without_launcher_variables(os.environ)
    port, processes, outputs = str(free_port()), [], []
    logs.mkdir(parents=True, exist_ok=True)
    for rank in range(num_ranks):
        of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        of_rank |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        of_rank |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        output = logs / f"rank-{rank}-{time.monotonic_ns()}.log"
        words = [command, *arguments, *(last_rank_flags if rank == num_ranks - 1 else ())]
        process = _context.Process(
            target=_run_rank,
            args=(words, {**base, **of_rank, **environment}, str(output), injected),
            daemon=True,
        )
        process.start()
        processes.append(process)
        outputs.append(output)
    return ForkedRanks(processes, outputs)
