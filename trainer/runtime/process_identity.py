"""Serialisable process identity for liveness checks."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from trainer.runtime import distributed


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, identified by pid and start time within one boot and pid namespace. (A pid alone may be reused.)"""

    host: str
    pid: int
    started: int  # start time in clock ticks since boot, independent of clock jumps; 0 if unknown
    space: str  # boot id and pid namespace
    job: str  # Slurm job id, "" without Slurm
    restarts: int  # number of restarts of the Slurm job

    @classmethod
    def of_this_process(cls) -> "ProcessIdentity":
        return cls(
            socket.gethostname(),
            os.getpid(),
            _start_ticks(os.getpid()) or 0,
            _pid_space(),
            os.environ.get("SLURM_JOB_ID", ""),
            distributed.num_job_restarts(os.environ),
        )

    def is_alive(self) -> bool | None:
        """Return whether the process is running; None if it started in another boot or pid namespace, or if /proc is missing."""
        if self.space != _pid_space() or not self.started:
            return None
        return _start_ticks(self.pid) == self.started

    def __str__(self) -> str:
        job = f"Slurm job {self.job}, " if self.job else ""
        return f"{job}host {self.host}, pid {self.pid}"


def _start_ticks(pid: int) -> int | None:
    """Return a process's start time in clock ticks since boot, or None if the process does not exist or is a zombie."""
    fields = _stat(pid)
    return None if not fields or fields[0] in "ZX" else int(fields[19])


def parent_pid(pid: int) -> int:
    """Return the pid of a process's parent, or 0 if the process or /proc does not exist."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[str]:
    """Return the fields after the command name in /proc/<pid>/stat; [] if the file cannot be read.

    Index 0: state, 1: pid of the parent, 19: start time in clock ticks since boot.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the command name may contain spaces and parentheses


def _pid_space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # without /proc, each process gets its own space, so `is_alive` returns None
        return f"{socket.gethostname()} {os.getpid()}"
