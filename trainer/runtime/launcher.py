"""Is whoever started our rank still there?

The `deepspeed` command, told to end or killed, leaves its ranks running (0.19.8): they would train on for hours, unseen,
and hold the run directory. So a rank remembers its ancestors up to the topmost launcher, and asks to stop when that line
is broken. Who was started by something else (plain Python, srun, mpiexec) has no such line: srun and mpiexec end their
ranks themselves, and a shell may well be closed over a training.
"""

from __future__ import annotations

import os
from pathlib import Path

from trainer.runtime import process_identity

_COMMANDS = {"deepspeed", "torchrun"}
_MODULES = {"deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run"}
_MAX_ANCESTORS = 8  # a launcher, its helper, numactl, shells between them


class Launcher:
    """The line of processes from our parent up to the launcher; empty if no launcher is known."""

    def __init__(self) -> None:
        ancestors = _ancestors(_MAX_ANCESTORS)
        launchers = [place for place, pid in enumerate(ancestors) if _is_launcher(pid)]
        self._line = ancestors[: launchers[-1] + 1] if launchers else []

    @property
    def is_known(self) -> bool:
        return bool(self._line)

    @property
    def is_gone(self) -> bool:
        """Whether one of them has ended: its child then has another parent."""
        return _ancestors(len(self._line)) != self._line


def _ancestors(most: int) -> list[int]:
    """Numbers of our parent, its parent, ... (those that can be seen)."""
    found: list[int] = []
    pid = os.getppid()
    while len(found) < most and pid > 1:
        found.append(pid)
        pid = process_identity.parent_pid(pid)
    return found


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return False
    command = {Path(word).name for word in words[:2]}  # the second is the script that Python runs
    return bool(command & _COMMANDS or _MODULES & set(words))
