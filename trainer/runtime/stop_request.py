"""Asked to stop: a signal, or a time limit that comes near, only sets a flag; the ranks agree on it at safe points.

SIGTERM (a scheduler, a launcher), SIGUSR1 (Slurm's --signal), SIGHUP (a terminal that was closed) and SIGINT (Ctrl-C) ask
for a checkpoint and an end, and so does a launcher that is gone (launcher.py). A rank that saved alone would leave the
others waiting in a collective. Where there is nothing to save (before the first step, in an evaluation, whose answers are
on disk at once) the process ends there and then, with a status that says: start me again. Imports nothing heavy: it
listens while the imports run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType

from trainer.runtime import distributed
from trainer.runtime.exit_codes import EXIT_REQUEUE
from trainer.runtime.launcher import Launcher

_SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_LAUNCHER_POLL_SECONDS = 1.0
_SLACK_SECONDS = 5.0


class StopRequest:
    """Remembers the first signal, and watches launcher and time limit; `requested`: this rank was asked to stop."""

    def __init__(self) -> None:
        self.cause = ""
        self.started = time.monotonic()
        self._launcher: Launcher | None = None
        self._is_deferring = False
        self._deadline: float | None = None  # on the monotonic clock, which does not jump
        self._save_seconds = 0.0
        self._step_seconds = 0.0

    def install_signal_handlers(self) -> None:
        """From now on a signal, or the launcher's end, ends the process at once, with the status: start me again."""
        for number in _SCHEDULER_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._on_signal)
        if self._launcher is None:
            self._launcher = Launcher()
            if self._launcher.is_known:
                threading.Thread(
                    target=self._watch_launcher, args=(self._launcher,), name="launcher", daemon=True
                ).start()

    def defer_signals(self) -> None:
        """From now on there is something to save: signals, Ctrl-C too, are remembered instead."""
        self._is_deferring = True
        signal.signal(signal.SIGINT, self._on_signal)

    def ignore_signals(self) -> None:
        """Everything is saved: a signal would only change the exit status."""
        for number in (*_SCHEDULER_SIGNALS, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def set_deadline(self, seconds_left: float, save_seconds: float) -> None:
        """Stop in time for a save that takes about `save_seconds`."""
        self._save_seconds = save_seconds
        self._deadline = time.monotonic() + seconds_left

    def record_duration(self, step: float = 0.0, save: float = 0.0) -> None:
        """Learn from measured seconds how long before the limit one has to stop; the longest counts."""
        self._step_seconds = max(self._step_seconds, step)
        self._save_seconds = max(self._save_seconds, save)

    @property
    def reason(self) -> str:
        """Why this rank was asked to stop; "" if it was not."""
        if self.cause or self._deadline is None:
            return self.cause
        reserve = 2 * self._save_seconds + 2 * self._step_seconds + _SLACK_SECONDS
        return "the time limit is near" if time.monotonic() + reserve >= self._deadline else ""

    @property
    def is_requested(self) -> bool:
        return bool(self.reason)

    def should_stop_on_any_rank(self) -> bool:
        """Collective. Whether any rank was asked to stop."""
        return distributed.any_rank(self.is_requested)

    def _watch_launcher(self, launcher: Launcher) -> None:
        while not launcher.is_gone:
            time.sleep(_LAUNCHER_POLL_SECONDS)
        self._stop("the launcher is gone")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop(signal.Signals(number).name)

    def _stop(self, told: str) -> None:
        self.cause = self.cause or told
        if not self._is_deferring:
            with contextlib.suppress(OSError):  # who read our output may be gone too
                os.write(2, f"{self.cause}: ended as asked, everything done so far is on disk\n".encode())
            os._exit(EXIT_REQUEUE)
