"""Ranks that start in a moment: forked from a server that has done the imports, then the real command from its first line.

Twelve of the thirteen seconds a training takes to start are imports, and they write nothing; without them hundreds of
kills are affordable. Everything else is what a user's rank does: an environment of its own, `tools/train.py` (or another tool) run
as `__main__` with its flags, a session of its own, its output in a file.
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


def _live(command: list[str], environment: dict[str, str], output: str, injected: str) -> None:
    """In the forked process: become this rank of the command."""
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
class Life:
    """All ranks of one start of the command. A context manager: leaves nobody behind."""

    processes: list[BaseProcess]
    outputs: list[Path]

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        for process in self.processes:
            process.join()

    def kill(self, ranks: Sequence[int] | None = None, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to some ranks (all by default) that have not ended."""
        for rank, process in enumerate(self.processes):
            if (ranks is None or rank in ranks) and process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid or 0, number)

    @property
    def statuses(self) -> list[int | None]:
        """Exit status of every rank (negative: the signal that killed it), None while it runs."""
        return [process.exitcode for process in self.processes]

    def wait(self, seconds: float = 180.0) -> list[Outcome]:
        """Wait for all ranks. Fails, with what they printed, if one has not ended by then."""
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
    last_ranks_own: Sequence[str] = (),
    command: str = TRAIN,
    **environment: str,
) -> Life:
    """Start the command on so many ranks. `injected`: what injection.py does in them (JSON), if anything.

    `last_ranks_own`: flags that the last rank alone is given.
    """
    base = without_launcher_variables(os.environ)
    port, processes, outputs = str(free_port()), [], []
    logs.mkdir(parents=True, exist_ok=True)
    for rank in range(num_ranks):
        ours = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        ours |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ours |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        output = logs / f"rank-{rank}-{time.monotonic_ns()}.log"
        flags = [command, *arguments, *(last_ranks_own if rank == num_ranks - 1 else ())]
        told = (flags, {**base, **ours, **environment}, str(output), injected)
        process = _context.Process(target=_live, args=told, daemon=True)
        process.start()
        processes.append(process)
        outputs.append(output)
    return Life(processes, outputs)
