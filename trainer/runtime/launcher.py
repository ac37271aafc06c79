"""Detection of a launcher (deepspeed, torchrun) that has exited while its ranks are running.

When the `deepspeed` command is terminated or killed, its ranks keep running (0.19.8) and hold the run directory. A rank
therefore records its ancestor processes up to the topmost launcher and stops when that chain changes. Other parents
are not watched: srun and mpiexec end their ranks themselves, and a shell may be closed during a training.
"""

from __future__ import annotations

import os
from pathlib import Path

from trainer.runtime import process_identity

_COMMANDS = {"deepspeed", "torchrun"}
_MODULES = {"deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run"}
_MAX_ANCESTORS = 8  # launcher, its helper process, numactl, shells between them


class Launcher:
    """The processes from this one's parent up to the topmost launcher, if there is one."""

    def __init__(self) -> None:
        pids = _ancestor_pids(_MAX_ANCESTORS)
        launchers = [index for index, pid in enumerate(pids) if _is_launcher(pid)]
        self._pids = pids[: launchers[-1] + 1] if launchers else []

    @property
    def is_known(self) -> bool:
        return bool(self._pids)

    @property
    def is_gone(self) -> bool:
        """True if one of the processes has ended: its child then has another parent."""
        return _ancestor_pids(len(self._pids)) != self._pids


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
    return bool(command & _COMMANDS or _MODULES & set(words))
