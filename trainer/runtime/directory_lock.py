"""Exclusive locks on run, study and annotation directories. `flock` is not used: it may do nothing on Lustre and GPFS.

The lock is a directory that contains owner.json. The directory is written under a staging name and renamed to its final
name. The rename fails if the final name is a directory with content. So exactly one process acquires the lock, and a
lock always contains owner.json. A stale lock is renamed to a name derived from its owner's token and kept for a while.
A second process that considers the same lock stale could rename the new lock by mistake. But this rename has the same
target name, which already exists. So the rename fails, and the new lock stays.

An owner on this machine (same boot and pid namespace) is gone if its process has ended. Any other owner is gone if its
Slurm job is not running, if this process belongs to a restart of that job, or if the owner's heartbeats have stopped. To
detect stopped heartbeats, the mtime of owner.json is compared with the mtime of a new file on the same file system. Clocks
may jump, so a lock with an old mtime is watched for a while before it is taken over.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
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
    """An acquired lock. On ranks other than 0, `owner` is None and every method is a no-op."""

    def __init__(self, path: Path, owner: LockOwner | None):
        self._path, self._owner = path, owner

    def heartbeat(self) -> None:
        """Update the mtime of owner.json."""
        if self._owner:
            with contextlib.suppress(OSError):
                os.utime(self._path / _OWNER)  # without an explicit time, the file server's clock is used

    def taken_over_by(self) -> str | None:
        """Return an error message if this process no longer holds the lock, else None."""
        if self._owner is None:
            return None
        now = _read(self._path)
        if now is not None and now.token == self._owner.token:
            return None
        by = f"by {now.process} at {now.since}" if now else "(the lock is missing)"
        return f"{self._path} was taken from this job {by}; this job stops, else it could overwrite files of the new job"

    def release(self) -> None:
        """Remove the lock if this process still holds it."""
        if self._owner and self.taken_over_by() is None:
            released = self._path.with_name(f".{self._path.name}.{self._owner.token}.released.tmp")
            with contextlib.suppress(OSError):
                os.rename(self._path, released)
                shutil.rmtree(released, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Context manager that holds the lock and sends heartbeats in a thread. See `acquire` for the errors."""
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
    """Return the owner; None if there is no lock or the owner has ended. Raises UserError if owner.json is invalid."""
    owner = _read(path)
    return None if owner is None or owner.process.is_alive() is False else owner


def acquire(path: Path) -> DirectoryLock:
    """Acquire the lock and return it. Take it over if its owner is gone. Raises UserError if the owner may be alive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    owner = LockOwner(ProcessIdentity.of_this_process(), secrets.token_hex(8), since)
    for _ in range(_MAX_ATTEMPTS):
        if _install(path, owner):
            _remove_stale_locks(path)
            return DirectoryLock(path, owner)
        holder = _read(path)
        if holder is None:  # the lock was released after _install failed
            continue
        reason, text = _reason_owner_is_gone(path, holder, owner), f"{holder.process}, since {holder.since}"
        if reason is None:
            raise UserError(
                f"{path.parent} is in use: {text}; wait for this process, end it, or give another output_dir "
                f"(if the process is surely gone, remove {path})"
            )
        stale = path.with_name(f".{path.name}.{holder.token}.gone.tmp")
        with contextlib.suppress(FileNotFoundError):  # another process renamed the lock first
            if atomic_dir.rename_unless_exists(path, stale):
                terminal.warning(f"{path.parent}: took over from {text}: {reason}")
    raise UserError(
        f"{path}: other processes acquired it {_MAX_ATTEMPTS} times in a row; start one job per directory"
    )


def _install(path: Path, owner: LockOwner) -> bool:
    """Publish the lock directory and return True. Return False if there is already a lock."""
    staging = path.with_name(f".{path.name}.{owner.token}.tmp")
    staging.mkdir(exist_ok=True)
    atomic_dir.write_text(staging / _OWNER, json.dumps(asdict(owner), indent=1) + "\n")
    try:
        return atomic_dir.rename_unless_exists(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # staging exists only if the rename failed


def _read(path: Path) -> LockOwner | None:
    """Return the owner, or None if there is no lock. Raises UserError if owner.json is invalid."""
    try:
        record = json.loads((path / _OWNER).read_text(encoding="utf-8"))
        return LockOwner(ProcessIdentity(**record["process"]), record["token"], record["since"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        remedy = f"if no job uses the directory, remove {path}"
        raise UserError(f"{path / _OWNER} cannot be read ({error}); {remedy}") from None


def _remove_stale_locks(path: Path) -> None:
    """Remove all stale locks except the newest eight, which protect the new lock (see the module's docstring)."""
    with contextlib.suppress(OSError):
        stale = sorted(path.parent.glob(f".{path.name}.*.gone.tmp"), key=lambda lock: lock.stat().st_ctime)
        for lock in stale[:-_MAX_STALE_LOCKS]:
            shutil.rmtree(lock, ignore_errors=True)


def _reason_owner_is_gone(path: Path, holder: LockOwner, owner: LockOwner) -> str | None:
    """Return the reason why `holder` is gone, or None if it may be alive. `owner` describes this process."""
    process, this_process = holder.process, owner.process
    is_alive = process.is_alive()
    if is_alive is not None:
        return None if is_alive else "its process is gone"
    if process.job and process.job == this_process.job:
        if process.restarts < this_process.restarts:
            return "this is the same Slurm job, started again"
    elif process.job and _job_is_gone(process.job):
        return "its Slurm job is not running any more"
    return _reason_stale(path)


def _job_is_gone(job: str) -> bool:
    """Return whether squeue reports that a job is pending, ended or unknown. False if squeue fails."""
    try:
        command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return False
    return "Invalid job id" in done.stderr if done.returncode else set(done.stdout.split()) <= {"PENDING"}


def _reason_stale(path: Path) -> str | None:
    """Return a reason if the heartbeats have stopped or the lock was released during the check, else None."""
    owner = path / _OWNER
    try:
        last, now = owner.stat().st_mtime_ns, _file_system_time_ns(path.parent)
        age_seconds = (now - last) / 1e9
        if age_seconds < _STALE_SECONDS:
            return None
        message = f"no heartbeat for {age_seconds:.0f} s"
        terminal.info(f"{path}: {message}; watching the lock for {_WATCH_SECONDS:.0f} s")
        time.sleep(_WATCH_SECONDS)
        return message if owner.stat().st_mtime_ns == last else None
    except FileNotFoundError:
        return "it was released meanwhile"


def _file_system_time_ns(folder: Path) -> int:
    """Return the time of the clock that sets the mtime of files in `folder`. It may be a file server's clock."""
    with tempfile.NamedTemporaryFile(prefix=".clock-", suffix=".tmp", dir=folder) as probe:
        return Path(probe.name).stat().st_mtime_ns
