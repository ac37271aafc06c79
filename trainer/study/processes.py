"""Start the commands of stages, and find and end all processes of a stage.

The ranks of a stage cannot be found by process group or parent: mpiexec starts each rank in its own session, and SIGTERM
ends the `deepspeed` command but not its child processes. So each stage is started with two environment variables that
contain the study's directory and the stage's label. All processes of the stage inherit these variables.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Self

import psutil

from trainer.errors import UserError
from trainer.runtime import distributed
from trainer.storage.run_directory import StudyDirectory

STUDY_VARIABLE = "SOCRATIC_TRAINER_STUDY"
STAGE_VARIABLE = "SOCRATIC_TRAINER_STAGE"
_POLL_SECONDS = 0.1
_KILL_TIMEOUT_SECONDS = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Context manager that counts SIGINT, SIGTERM and SIGHUP, so that these signals do not interrupt the start of a stage."""

    count = 0

    def __enter__(self) -> Self:
        self._previous = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, handler in self._previous.items():
            if handler is not signal.SIG_IGN:  # nohup sets SIGHUP to SIG_IGN, which must stay in effect
                signal.signal(number, self._count_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _count_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def start_process(
    command: Sequence[str], study: StudyDirectory, stage: str, log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start the command of a stage in a new session, which Ctrl-C does not reach. Append the command's output to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        return subprocess.Popen(
            list(command),
            env=stage_variables(study, stage, environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stage_variables(study: StudyDirectory, stage: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return all environment variables of a stage. `environment`: variables that the stage has besides the inherited ones."""
    inherited = distributed.without_launcher_variables(os.environ)
    return {**inherited, **environment, STUDY_VARIABLE: _study_value(study), STAGE_VARIABLE: stage}


def processes_of_study(study: StudyDirectory, stage: str | None = None) -> list[psutil.Process]:
    """Return the live processes of the study, or of one stage, on this machine, without the current process."""
    return list(itertools.chain.from_iterable(_by_stage(study, stage).values()))


def end_processes(
    study: StudyDirectory,
    grace_seconds: float,
    should_kill: Callable[[], bool] = lambda: False,
    stage: str | None = None,
) -> list[psutil.Process]:
    """End every process of the study, or of one stage, and wait until none is left.

    First, the ranks get SIGTERM, so that training can save a checkpoint. A launcher may kill its ranks on SIGTERM, so the
    launcher gets SIGTERM after the ranks have ended. After `grace_seconds`, or if `should_kill()` returns True, the remaining
    processes are killed. Returns the processes that survive SIGKILL because they hang in the kernel (lost file system).
    """
    deadline = time.monotonic() + grace_seconds
    killed_at: float | None = None
    signalled: set[psutil.Process] = set()
    while by_stage := _by_stage(study, stage):
        alive = list(itertools.chain.from_iterable(by_stage.values()))
        now = time.monotonic()
        if killed_at is not None and now - killed_at > _KILL_TIMEOUT_SECONDS:
            return alive
        if now >= deadline or should_kill():
            killed_at = killed_at or now
            for process in alive:
                _signal(process, signal.SIGKILL)
        else:
            receivers = {process for members in by_stage.values() for process in _ranks(members) or members}
            for process in receivers - signalled:
                _signal(process, signal.SIGTERM)
            signalled |= receivers
        time.sleep(_POLL_SECONDS)
    return []


def _by_stage(study: StudyDirectory, stage: str | None = None) -> dict[str, list[psutil.Process]]:
    study_value, by_stage = _study_value(study), defaultdict(list)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # skip ended or inaccessible processes
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
            label = environment.get(
                STAGE_VARIABLE, ""
            ).strip()  # blanks: the fork server, which ends by itself
            if label and environment.get(STUDY_VARIABLE) == study_value and stage in (None, label):
                by_stage[label].append(process)
    return by_stage


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)


def _ranks(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that a launcher started as ranks, without child processes of ranks."""
    parents = {}
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError, UserError):
            if distributed.environment_from_launcher(process.environ()).launcher != "single":
                parents[process] = process.ppid()
    pids = {process.pid for process in parents}
    return [process for process, parent in parents.items() if parent not in pids]


def _study_value(study: StudyDirectory) -> str:
    return str(study.path.resolve())
