"""Which process somebody was, written down so that another can later tell whether it still lives."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from trainer.runtime import distributed


@dataclass(frozen=True)
class ProcessIdentity:
    """A process. Process numbers are used again, so its start counts too; they mean something in one `space` only."""

    host: str
    pid: int
    started: int  # clock ticks after boot: jumps of the clock do not matter
    space: str  # boot and pid namespace, in which `pid` is unique
    job: str  # Slurm's number, "" without
    restarts: int  # of that job

    @classmethod
    def of_this_process(cls) -> ProcessIdentity:
        return cls(
            socket.gethostname(),
            os.getpid(),
            _start_ticks(os.getpid()) or 0,
            _pid_space(),
            os.environ.get("SLURM_JOB_ID", ""),
            distributed.restarts_of_job(os.environ),
        )

    def is_alive(self) -> bool | None:
        """Whether the process is still there; None if that cannot be seen from here."""
        if self.space != _pid_space() or not self.started:
            return None
        return _start_ticks(self.pid) == self.started

    def __str__(self) -> str:
        job = f"Slurm job {self.job}, " if self.job else ""
        return f"{job}host {self.host}, pid {self.pid}"


def _start_ticks(pid: int) -> int | None:
    """When a process was started, in clock ticks after boot; None if there is none (or nothing but its exit status)."""
    fields = _stat(pid)
    return None if not fields or fields[0] in "ZX" else int(fields[19])


def parent_pid(pid: int) -> int:
    """The number of a process's parent; 0 if there is no such process, or no /proc."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[str]:
    """What Linux tells of a process, from its state on: 0 state, 1 parent, 19 start; empty if it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the command, in parentheses before them, may contain anything


def _pid_space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: nothing can be said about other processes
        return f"{socket.gethostname()} {os.getpid()}"
