"""One process or job at a time in a directory, without `flock`, which does nothing on Lustre and GPFS.

The lock is a directory with the owner's name in it, made under another name and renamed into place: a directory cannot
be renamed onto one that is not empty, so of several takers exactly one wins, and the lock is never there without its
owner's name. A lock whose owner is gone is renamed to a name that follows from that owner's token and stays there for
a while: a second taker who judged the same owner cannot move the first one's new lock away, since the name is taken.

The owner is gone if its process is (as far as that can be seen from here), if the Slurm job is no longer running, if
we are that job, started again, or if it shows no sign of life: the lock's time of change, by the file system's own
clock, compared with a file that was changed just now; and then it is watched for a while, because clocks jump.

A training holds the lock of its run, an annotation that of its directory (two would pay for the same requests), whoever
runs or submits a study that of the study.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.errors import UserError
from trainer.runtime import terminal
from trainer.runtime.process_identity import ProcessIdentity
from trainer.storage import atomic_dir

HEARTBEAT_SECONDS = 10.0  # at least so often the owner gives a sign of life
_STALE_SECONDS = 300.0
_WATCH_SECONDS = 3 * HEARTBEAT_SECONDS
_OWNER = "owner.json"
_MAX_STALE_LOCKS = 8
_MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class LockOwner:
    process: ProcessIdentity
    token: str  # of this taking
    since: str  # local time, for people


class DirectoryLock:
    """A hold on a directory; without an owner (a rank whose rank 0 holds it) an empty shell."""

    def __init__(self, path: Path, owner: LockOwner | None):
        self._path, self._owner = path, owner

    def heartbeat(self) -> None:
        """A sign of life."""
        if self._owner:
            with contextlib.suppress(OSError):
                os.utime(self._path / _OWNER)  # no time given: the file server's own

    def taken_over_by(self) -> str | None:
        """Who has taken the lock from us, as a message; None while it is ours."""
        if self._owner is None:
            return None
        now = _read(self._path)
        if now is not None and now.token == self._owner.token:
            return None
        by = f"by {now.process} at {now.since}" if now else "(it is gone)"
        return f"{self._path} was taken from this job {by}; it stops here, before it could overwrite the other's work"

    def release(self) -> None:
        if self._owner and self.taken_over_by() is None:
            aside = self._path.with_name(f".{self._path.name}.{self._owner.token}.released.tmp")
            with contextlib.suppress(OSError):
                os.rename(self._path, aside)
                shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock while in use; a thread gives the signs of life. Raises UserError, naming the holder, if it is taken."""
    lock, ended = acquire(path), threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            lock.heartbeat()

    threading.Thread(target=beat, name="lock", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        lock.release()


def current_owner(path: Path) -> LockOwner | None:
    """Who holds the lock, to show it; None if nobody does, or it is known to be gone. Raises UserError if it is damaged."""
    found = _read(path)
    return None if found is None or found.process.is_alive() is False else found


def acquire(path: Path) -> DirectoryLock:
    """Take the lock, also from an owner that is gone. Raises UserError, naming who holds it and since when, or OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    me = LockOwner(
        ProcessIdentity.of_this_process(), secrets.token_hex(8), time.strftime("%Y-%m-%d %H:%M:%S %z")
    )
    for _ in range(_MAX_ATTEMPTS):
        if _install(path, me):
            _remove_old_locks(path)
            return DirectoryLock(path, me)
        other = _read(path)
        if other is None:  # released between the two looks
            continue
        reason = _reason_owner_is_gone(path, other, me)
        if reason is None:
            raise UserError(
                f"{path.parent} is in use: {other.process}, since {other.since}; wait for it, end it, or give another "
                f"output_dir (if it is surely gone, remove {path})"
            )
        if _set_aside(path, other):
            terminal.warning(f"{path.parent}: took over from {other.process}, since {other.since}: {reason}")
    raise UserError(f"{path}: others take and release it all the time; start one job per directory")


def _install(path: Path, owner: LockOwner) -> bool:
    staging = path.with_name(f".{path.name}.{owner.token}.tmp")
    staging.mkdir(exist_ok=True)
    atomic_dir.write_text(staging / _OWNER, json.dumps(asdict(owner), indent=1) + "\n")
    try:
        os.rename(staging, path)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _read(path: Path) -> LockOwner | None:
    """The owner of the lock; None if nobody is. Raises UserError if the file is damaged."""
    try:
        found = json.loads((path / _OWNER).read_text(encoding="utf-8"))
        return LockOwner(ProcessIdentity(**found["process"]), found["token"], found["since"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / _OWNER} cannot be read ({error}); if nobody works there, remove {path}"
        ) from None


def _set_aside(path: Path, other: LockOwner) -> bool:
    """Move the lock of an owner that is gone out of the way; False if somebody else was faster."""
    try:
        os.rename(path, path.with_name(f".{path.name}.{other.token}.gone.tmp"))
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            return False
        raise


def _remove_old_locks(path: Path) -> None:
    """Keep the last few locks that were set aside: a slow taker may still be about to move the same one."""
    with contextlib.suppress(OSError):
        aside = sorted(path.parent.glob(f".{path.name}.*.gone.tmp"), key=lambda old: old.stat().st_ctime)
        for old in aside[:-_MAX_STALE_LOCKS]:
            shutil.rmtree(old, ignore_errors=True)


def _reason_owner_is_gone(path: Path, other: LockOwner, me: LockOwner) -> str | None:
    """Why the other owner no longer counts; None if it may be alive."""
    lives = other.process.is_alive()
    if lives is not None:
        return None if lives else "its process is gone"
    if other.process.job and other.process.job == me.process.job:
        if other.process.restarts < me.process.restarts:
            return "this is the same Slurm job, started again"
    elif other.process.job and _job_is_gone(other.process.job):
        return "its Slurm job is not running any more"
    return _reason_stale(path)


def _job_is_gone(job: str) -> bool:
    """Whether Slurm says that a job does not run; False if it cannot be asked."""
    try:
        command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return False
    if told.returncode:
        return "Invalid job id" in told.stderr
    return not told.stdout.strip() or set(told.stdout.split()) <= {"PENDING"}


def _reason_stale(path: Path) -> str | None:
    """How long there was no sign of life, if it is long enough and stays so while we watch."""
    owner = path / _OWNER
    try:
        last, now = owner.stat().st_mtime_ns, _file_system_time(path.parent)
        silent = (now - last) / 1e9
        if silent < _STALE_SECONDS:
            return None
        terminal.info(f"{path}: no sign of life for {silent:.0f} s; watching it for {_WATCH_SECONDS:.0f} s")
        time.sleep(_WATCH_SECONDS)
        return f"no sign of life for {silent:.0f} s" if owner.stat().st_mtime_ns == last else None
    except FileNotFoundError:
        return "it was released meanwhile"


def _file_system_time(folder: Path) -> int:
    """Nanoseconds, by the clock that stamps files there, which may not be ours."""
    probe = folder / f".clock-{secrets.token_hex(4)}.tmp"
    probe.touch()
    try:
        return probe.stat().st_mtime_ns
    finally:
        probe.unlink()
