"""Stop requests by signals, a time limit or a lost launcher. All ranks stop together, at a point where they can save.

SIGTERM (scheduler, launcher), SIGUSR1 (Slurm's --signal), SIGHUP (closed terminal), SIGINT (Ctrl-C) and an exited
launcher request a checkpoint and an exit. During the training steps, a request only sets a flag, because a rank that saved
alone would hang in a collective. Before the first step and in an evaluation, there is nothing to save, so the process exits
immediately with EXIT_REQUEUE (after SIGINT, with EXIT_INTERRUPTED). KeyboardInterrupt is not used, because libraries catch
it during their import, and because a rank must not enter a collective after it. This module must not import heavy
libraries, because the signal handlers must be active before a command imports torch and DeepSpeed.

If the `deepspeed` command (0.19.8) is terminated or killed, its ranks continue and keep the run directory locked. So each rank
records its ancestor processes up to the topmost launcher (deepspeed, torchrun, our --num_gpus), and stops when this list changes.
Other parents are not watched: srun and mpiexec end their ranks themselves, and a shell may be closed during a training.
"""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from trainer.runtime import distributed, process_identity, terminal
from trainer.runtime.exit_codes import EXIT_INTERRUPTED, EXIT_REQUEUE

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
INTERRUPT = signal.SIGINT.name  # cause of a stop request by Ctrl-C
_LAUNCHER_COMMANDS = {"deepspeed", "torchrun"}
_LAUNCHER_MODULES = {"deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run"}
_LAUNCHER_POLL_SECONDS = 1.0
_MAX_ANCESTORS = 8  # enough for a launcher, its helper process, numactl, and shells between them
_SLACK_SECONDS = 5.0


class StopRequest:
    """The stop request of this rank. It records the first cause and watches the launcher and the deadline."""

    def __init__(self) -> None:
        self.cause = ""
        self.started = time.monotonic()
        self._is_watching = False
        self._is_deferring = False
        self._exit_lock = threading.Lock()  # acquired by the first thread that exits
        self._deadline: float | None = None  # value of time.monotonic() at the deadline
        self._save_seconds = 0.0
        self._step_seconds = 0.0

    def install_signal_handlers(self) -> None:
        """Exit immediately on a signal or at the end of the launcher, until `defer_signals` is called."""
        for number in _SIGNALS:
            # `nohup` starts commands with SIGHUP ignored, and shells start background jobs with SIGINT ignored.
            is_optional = number in (signal.SIGHUP, signal.SIGINT)
            if not (is_optional and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, self._on_signal)
        if not self._is_watching:
            self._is_watching = True
            # Python's handlers run when the main thread returns from C code, which a rank that waits in an MPI call does
            # not. The C handler writes the number of the signal to the wakeup descriptor, so this thread reacts at once.
            read_end, write_end = os.pipe()
            os.set_blocking(write_end, False)
            signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
            os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
            threading.Thread(target=self._watch_signals, args=(read_end,), daemon=True).start()
            if pids := _pids_up_to_launcher():
                threading.Thread(target=self._watch_launcher, args=(pids,), daemon=True).start()

    def defer_signals(self) -> None:
        """From now on, record stop requests instead of exiting, so that a checkpoint can be saved. Also handle SIGINT."""
        self._is_deferring = True
        signal.signal(signal.SIGINT, self._on_signal)

    def ignore_signals(self) -> None:
        """Ignore signals. Must be called after the last save, because from then on a signal would only change the exit status."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def set_deadline(self, seconds_left: float, save_seconds: float) -> None:
        """Set the deadline `seconds_left` seconds from now. A stop is requested early enough for a save that takes `save_seconds`."""
        self._save_seconds = save_seconds
        self._deadline = time.monotonic() + seconds_left

    def record_duration(self, step: float = 0.0, save: float = 0.0) -> None:
        """Record the seconds of a step or a save. The maxima determine how long before the deadline a stop is requested."""
        self._step_seconds = max(self._step_seconds, step)
        self._save_seconds = max(self._save_seconds, save)

    @property
    def reason(self) -> str:
        """The cause of this rank's stop request, or "" if there is no request."""
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

    def _watch_signals(self, read_end: int) -> None:
        while numbers := os.read(read_end, 1):
            if numbers[0] in _SIGNALS:
                self._stop(signal.Signals(numbers[0]).name)

    def _watch_launcher(self, pids: list[int]) -> None:
        while _ancestor_pids(len(pids)) == pids:  # if a process ends, its children get another parent
            time.sleep(_LAUNCHER_POLL_SECONDS)
        self._stop("the launcher is gone")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop(signal.Signals(number).name)

    def _stop(self, cause: str) -> None:
        self.cause = self.cause or cause
        if not self._is_deferring and self._exit_lock.acquire(blocking=False):
            if self.cause == INTERRUPT:
                terminal.write_from_signal_handler(terminal.INTERRUPTED)
                os._exit(EXIT_INTERRUPTED)
            text = f"{self.cause}: stopped as requested, all results so far are on disk"
            terminal.write_from_signal_handler(text)
            os._exit(EXIT_REQUEUE)


def _pids_up_to_launcher() -> list[int]:
    """Return the pids from this process's parent up to the topmost launcher; [] if there is no launcher."""
    pids = _ancestor_pids(_MAX_ANCESTORS)
    launchers = [index for index, pid in enumerate(pids) if _is_launcher(pid)]
    return pids[: launchers[-1] + 1] if launchers else []


def _ancestor_pids(limit: int) -> list[int]:
    """Return the pids of at most `limit` visible ancestors other than pid 1: the parent, its parent, and so on."""
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
    command = {Path(word).name for word in words[:2]}  # words[1]: the script of a Python process
    starts_launcher = any(word.startswith("--num_gpus") for word in words)  # trainer/commands/launcher.py
    return bool(starts_launcher or command & _LAUNCHER_COMMANDS or _LAUNCHER_MODULES & set(words))
