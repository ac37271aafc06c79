"""Which process somebody was, written down so that another can later tell whether it still lives."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from trainer import distributed


@dataclass(frozen=True)
class Identity:
    """A process. Process numbers are used again, so its start counts too; they mean something in one `space` only."""

    host: str
    pid: int
    started: int  # clock ticks after boot: jumps of the clock do not matter
    space: str  # boot and pid namespace, in which `pid` is unique
    job: str  # Slurm's number, "" without
    restarts: int  # of that job

    @classmethod
    def of_this_process(cls) -> Identity:
        return cls(
            socket.gethostname(),
            os.getpid(),
            _start(os.getpid()) or 0,
            _space(),
            os.environ.get("SLURM_JOB_ID", ""),
            distributed.restarts_of_job(os.environ),
        )

    def lives(self) -> bool | None:
        """Whether the process is still there; None if that cannot be seen from here."""
        if self.space != _space() or not self.started:
            return None
        return _start(self.pid) == self.started

    def __str__(self) -> str:
        job = f"Slurm job {self.job}, " if self.job else ""
        return f"{job}host {self.host}, pid {self.pid}"


def _start(pid: int) -> int | None:
    """When a process was started, in clock ticks after boot; None if there is none (or nothing but its exit status)."""
    try:
        # The command, in parentheses, may contain anything; the third field is the state, the 22nd the start.
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: nothing can be said about other processes
        return f"{socket.gethostname()} {os.getpid()}"
