"""Exclusive locks on run, study and annotation directories, without `flock`, which is a silent no-op on Lustre and GPFS.

The lock is a directory that contains owner.json, written under a staging name and renamed into place. A rename onto a
directory that is not empty fails, so exactly one of several takers succeeds, and a lock always has its owner file.
A stale lock is renamed to a name derived from its owner's token and kept for a while: a second process that judged the
same owner finds that name in use and cannot move the first one's new lock away.

An owner is gone if its process has ended (where visible from here), if its Slurm job is not running, if it is an earlier
start of this Slurm job, or if its heartbeats have stopped: the mtime of owner.json is compared with that of a new file
on the same file system, and then watched for a while, because clocks jump.
"""

from __future__ import annotations

import contextlib
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

HEARTBEAT_SECONDS = 10.0  # longest interval between two heartbeats of an owner
_STALE_SECONDS = 300.0
_WATCH_SECONDS = 3 * HEARTBEAT_SECONDS
_OWNER = "owner.json"
_MAX_STALE_LOCKS = 8
_MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class LockOwner:
    """Content of owner.json."""

    process: ProcessIdentity
    token: str  # unique for each acquisition
    since: str  # local time, for messages


class DirectoryLock:
    """An acquired lock. Without an owner (ranks other than 0) every method is a no-op."""

    def __init__(self, path: Path, owner: LockOwner | None):
        self._path, self._owner = path, owner

    def heartbeat(self) -> None:
        """Update the mtime of owner.json."""
        if self._owner:
            with contextlib.suppress(OSError):
                os.utime(self._path / _OWNER)  # without a time: the file server's clock

    def taken_over_by(self) -> str | None:
        """Return an error message if this process no longer holds the lock, else None."""
        if self._owner is None:
            return None
        now = _read(self._path)
        if now is not None and now.token == self._owner.token:
            return None
        by = f"by {now.process} at {now.since}" if now else "(the lock is missing)"
        return f"{self._path} was taken from this job {by}; this job stops, as it could overwrite the other's files"

    def release(self) -> None:
        """Remove the lock if this process still holds it."""
        if self._owner and self.taken_over_by() is None:
            released = self._path.with_name(f".{self._path.name}.{self._owner.token}.released.tmp")
            with contextlib.suppress(OSError):
                os.rename(self._path, released)
                shutil.rmtree(released, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Context manager that holds the lock; a thread sends heartbeats. Raises UserError naming the owner if it is held."""
    lock, released = acquire(path), threading.Event()

    def send_heartbeats() -> None:
        while not released.wait(HEARTBEAT_SECONDS):
            lock.heartbeat()

    threading.Thread(target=send_heartbeats, name="lock", daemon=True).start()
    try:
        yield
    finally:
        released.set()
        lock.release()


def current_owner(path: Path) -> LockOwner | None:
    """Return the owner, None if the lock is free or its process has ended. Raises UserError if owner.json is invalid."""
    found = _read(path)
    return None if found is None or found.process.is_alive() is False else found


def acquire(path: Path) -> DirectoryLock:
    """Acquire the lock, also from an owner that is gone. Raises UserError naming a live owner, or OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = LockOwner(
        ProcessIdentity.of_this_process(), secrets.token_hex(8), time.strftime("%Y-%m-%d %H:%M:%S %z")
    )
    for _ in range(_MAX_ATTEMPTS):
        if _install(path, owner):
            _remove_stale_locks(path)
            return DirectoryLock(path, owner)
        other = _read(path)
        if other is None:  # released after _install failed
            continue
        reason = _reason_owner_is_gone(path, other, owner)
        if reason is None:
            raise UserError(
                f"{path.parent} is in use: {other.process}, since {other.since}; wait for it, end it, or give another "
                f"output_dir (if it is surely gone, remove {path})"
            )
        stale = path.with_name(f".{path.name}.{other.token}.gone.tmp")
        with contextlib.suppress(FileNotFoundError):  # another process renamed it first
            if atomic_dir.rename_unless_exists(path, stale):
                terminal.warning(
                    f"{path.parent}: took over from {other.process}, since {other.since}: {reason}"
                )
    raise UserError(
        f"{path}: acquired by other processes {_MAX_ATTEMPTS} times in a row; start one job per directory"
    )


def _install(path: Path, owner: LockOwner) -> bool:
    """Publish the lock directory; return False if there is one."""
    staging = path.with_name(f".{path.name}.{owner.token}.tmp")
    staging.mkdir(exist_ok=True)
    atomic_dir.write_text(staging / _OWNER, json.dumps(asdict(owner), indent=1) + "\n")
    try:
        return atomic_dir.rename_unless_exists(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # it is still there unless it was renamed


def _read(path: Path) -> LockOwner | None:
    """Return the owner; None without a lock. Raises UserError if owner.json is invalid."""
    try:
        found = json.loads((path / _OWNER).read_text(encoding="utf-8"))
        return LockOwner(ProcessIdentity(**found["process"]), found["token"], found["since"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / _OWNER} cannot be read ({error}); if no job uses the directory, remove {path}"
        ) from None


def _remove_stale_locks(path: Path) -> None:
    """Remove old stale locks and keep the newest.

    A slow process may still take a dead owner for the current one. Its rename fails while the target, which is named
    after the dead owner's token, exists; so it cannot remove the new owner's lock.
    """
    with contextlib.suppress(OSError):
        stale = sorted(path.parent.glob(f".{path.name}.*.gone.tmp"), key=lambda lock: lock.stat().st_ctime)
        for lock in stale[:-_MAX_STALE_LOCKS]:
            shutil.rmtree(lock, ignore_errors=True)


def _reason_owner_is_gone(path: Path, other: LockOwner, owner: LockOwner) -> str | None:
    """Return why `other` is gone, seen by the process of `owner`; None if it may be alive."""
    is_alive = other.process.is_alive()
    if is_alive is not None:
        return None if is_alive else "its process is gone"
    if other.process.job and other.process.job == owner.process.job:
        if other.process.restarts < owner.process.restarts:
            return "this is the same Slurm job, started again"
    elif other.process.job and _job_is_gone(other.process.job):
        return "its Slurm job is not running any more"
    return _reason_stale(path)


def _job_is_gone(job: str) -> bool:
    """Return whether squeue reports that a job is not running; False if squeue fails."""
    try:
        command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return False
    if done.returncode:
        return "Invalid job id" in done.stderr
    return not done.stdout.strip() or set(done.stdout.split()) <= {"PENDING"}


def _reason_stale(path: Path) -> str | None:
    """Return a message if the last heartbeat is too old and none comes within _WATCH_SECONDS, else None."""
    owner = path / _OWNER
    try:
        last, now = owner.stat().st_mtime_ns, _file_system_time_ns(path.parent)
        age_seconds = (now - last) / 1e9
        if age_seconds < _STALE_SECONDS:
            return None
        message = f"no heartbeat for {age_seconds:.0f} s"
        terminal.info(f"{path}: {message}; watching it for {_WATCH_SECONDS:.0f} s")
        time.sleep(_WATCH_SECONDS)
        return message if owner.stat().st_mtime_ns == last else None
    except FileNotFoundError:
        return "it was released meanwhile"


def _file_system_time_ns(folder: Path) -> int:
    """Return the time of the clock that stamps files in `folder`, which may be a file server's."""
    probe = folder / f".clock-{secrets.token_hex(4)}.tmp"
    probe.touch()
    try:
        return probe.stat().st_mtime_ns
    finally:
        probe.unlink()
