"""Start a command and be sure to end all of it.

A launcher's ranks are not to be found by process group: mpiexec gives each a session of its own, and SIGTERM to the
`deepspeed` command leaves them running without a parent. So every process of a study carries the study's directory in
its environment, where it is inherited; even the ranks of a study that was killed (kill -9) are found by it later. The
label of its stage stands beside it: what a stage that failed has left is ended while other stages go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from trainer.errors import UserError
from trainer.runtime import distributed
from trainer.storage.run_directory import StudyDirectory

MARK = "SOCRATIC_TRAINER_STUDY"
STAGE_MARK = "SOCRATIC_TRAINER_STAGE"
_POLL_SECONDS = 0.1
_KILLING_TAKES_SECONDS = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Counts Ctrl-C, SIGTERM and SIGHUP while in use: an interrupt in the middle of a start would leave orphans."""

    count = 0

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def start_process(
    command: Sequence[str], study: StudyDirectory, stage: str, log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a stage's command whose output is appended to `log`, out of reach of the terminal's Ctrl-C."""
    inherited = distributed.without_launcher_variables(os.environ)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        return subprocess.Popen(
            list(command),
            env={**inherited, **environment, MARK: _mark(study), STAGE_MARK: stage},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def processes_of_study(study: StudyDirectory, stage: str | None = None) -> list[psutil.Process]:
    """Every living process of the study on this machine, except the one that runs the study; or those of one stage."""
    return [process for found in _by_stage(study, stage).values() for process in found]


def end_processes(
    study: StudyDirectory,
    grace_seconds: float,
    impatient: Callable[[], bool] = lambda: False,
    stage: str | None = None,
) -> list[psutil.Process]:
    """End every process of the study, or of one stage; return when none is left.

    The ranks are told by SIGTERM, so that a training can save; their launchers would kill them meanwhile and are told
    after them, each stage's after its own ranks. Whoever is left after the grace time, or when `impatient()`, is killed.
    Returns processes that even survive that (they hang in the kernel, e.g. in a file system that is gone).
    """
    deadline = time.monotonic() + grace_seconds
    killed_at: float | None = None
    told: set[psutil.Process] = set()
    while by_stage := _by_stage(study, stage):
        alive = [process for found in by_stage.values() for process in found]
        now = time.monotonic()
        if killed_at is not None and now - killed_at > _KILLING_TAKES_SECONDS:
            return alive
        if now >= deadline or impatient():
            killed_at = killed_at or now
            for process in alive:
                _signal(process, signal.SIGKILL)
        else:
            next_ones = {process for found in by_stage.values() for process in _ranks(found) or found}
            for process in next_ones - told:
                _signal(process, signal.SIGTERM)
                told.add(process)
        time.sleep(_POLL_SECONDS)
    return []


def _by_stage(study: StudyDirectory, stage: str | None = None) -> dict[str, list[psutil.Process]]:
    """The living processes, by the label of their stage."""
    mark, found = _mark(study), defaultdict(list)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # another user's, or just ended
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
            label = environment.get(STAGE_MARK, "")
            if environment.get(MARK) == mark and stage in (None, label):
                found[label].append(process)
    return dict(found)


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)


def _ranks(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Processes that a launcher told their place, without the children they may have."""
    ranks = {}
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError, UserError):
            if distributed.environment_from_launcher(process.environ()).launcher != "single":
                ranks[process.pid] = process
    return [process for process in ranks.values() if _parent(process) not in ranks]


def _parent(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.Error:
        return 0


def _mark(study: StudyDirectory) -> str:
    return str(study.path.resolve())
