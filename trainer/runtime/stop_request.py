"""Stop requests by signals, a time limit or a lost launcher; the ranks agree on them at safe points.

SIGTERM (scheduler, launcher), SIGUSR1 (Slurm's --signal), SIGHUP (closed terminal), SIGINT (Ctrl-C) and an exited launcher
request a checkpoint and an exit. They only set a flag, since a rank that saved alone would hang in a collective. Where
there is nothing to save (before the first step, or in an evaluation, whose answers are already on disk) the process exits
immediately with EXIT_REQUEUE. Must not import heavy libraries: the handlers are active during imports.

When the `deepspeed` command is terminated or killed, its ranks keep running (0.19.8) and hold the run directory. A rank
therefore records its ancestor processes up to the topmost launcher (deepspeed, torchrun) and stops when that chain
changes. Other parents are not watched: srun and mpiexec end their ranks themselves, and a shell may be closed during a
training.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from trainer.runtime import distributed, process_identity
from trainer.runtime.exit_codes import EXIT_REQUEUE

_SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_LAUNCHER_COMMANDS = {"deepspeed", "torchrun"}
_LAUNCHER_MODULES = {"deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run"}
_LAUNCHER_POLL_SECONDS = 1.0
_MAX_ANCESTORS = 8  # launcher, its helper process, numactl, shells between them
_SLACK_SECONDS = 5.0


class StopRequest:
    """The stop request of this rank: records the first cause, and watches the launcher and the deadline."""

    def __init__(self) -> None:
        self.cause = ""
        self.started = time.monotonic()
        self._is_watching = False
        self._is_deferring = False
        self._deadline: float | None = None  # of time.monotonic()
        self._save_seconds = 0.0
        self._step_seconds = 0.0

    def install_signal_handlers(self) -> None:
        """Make signals and the launcher's exit end the process immediately with EXIT_REQUEUE."""
        for number in _SCHEDULER_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._on_signal)
        if not self._is_watching:
            self._is_watching = True
            if pids := _pids_up_to_launcher():
                threading.Thread(
                    target=self._watch_launcher, args=(pids,), name="launcher", daemon=True
                ).start()

    def defer_signals(self) -> None:
        """Make signals, including SIGINT, only set the cause: there is something to save."""
        self._is_deferring = True
        signal.signal(signal.SIGINT, self._on_signal)

    def ignore_signals(self) -> None:
        """Ignore signals after the last save: they would only change the exit status."""
        for number in (*_SCHEDULER_SIGNALS, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def set_deadline(self, seconds_left: float, save_seconds: float) -> None:
        """Request a stop early enough before the deadline for a save of about `save_seconds`."""
        self._save_seconds = save_seconds
        self._deadline = time.monotonic() + seconds_left

    def record_duration(self, step: float = 0.0, save: float = 0.0) -> None:
        """Record measured seconds of a step or a save; the longest determine the reserve before the deadline."""
        self._step_seconds = max(self._step_seconds, step)
        self._save_seconds = max(self._save_seconds, save)

    @property
    def reason(self) -> str:
        """The cause of the stop request of this rank, "" without a request."""
        if self.cause or self._deadline is None:
            return self.cause
        reserve_seconds = 2 * self._save_seconds + 2 * self._step_seconds + _SLACK_SECONDS
        return "the time limit is near" if time.monotonic() + reserve_seconds >= self._deadline else ""

    @property
    def is_requested(self) -> bool:
        return bool(self.reason)

    def should_stop_on_any_rank(self) -> bool:
        """Collective. Return whether any rank has a stop request."""
        return distributed.any_rank(self.is_requested)

    def _watch_launcher(self, pids: list[int]) -> None:
        while _ancestor_pids(len(pids)) == pids:  # the child of a process that has ended has another parent
            time.sleep(_LAUNCHER_POLL_SECONDS)
        self._stop("the launcher is gone")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop(signal.Signals(number).name)

    def _stop(self, cause: str) -> None:
        self.cause = self.cause or cause
        if not self._is_deferring:
            with contextlib.suppress(OSError):  # the reader of stderr may have exited too
                os.write(2, f"{self.cause}: stopped as requested, all results so far are on disk\n".encode())
            os._exit(EXIT_REQUEUE)


def _pids_up_to_launcher() -> list[int]:
    """Return the processes from this one's parent up to the topmost launcher; [] without a launcher."""
    pids = _ancestor_pids(_MAX_ANCESTORS)
    launchers = [index for index, pid in enumerate(pids) if _is_launcher(pid)]
    return pids[: launchers[-1] + 1] if launchers else []


def _ancestor_pids(limit: int) -> list[int]:
    """Return the pids of the parent, its parent, ..., as far as they are visible."""
    pids: list[int] = []
    pid = os.getppid()
    while len(pids) < limit and pid > 1:
        pids.append(pid)
        pid = process_identity.parent_pid(pid)
    return pids


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return False
    command = {Path(word).name for word in words[:2]}  # words[1] may be the script that Python runs
    return bool(command & _LAUNCHER_COMMANDS or _LAUNCHER_MODULES & set(words))
