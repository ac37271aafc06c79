"""Detection of hung ranks by heartbeat files: the hung rank is reported with its last step, and all ranks end.

A stopped rank leaves the others in a collective until `timeout_seconds`, whose error does not say which rank is missing.
So a thread of every rank increments a counter in a small file and watches the counter of the next rank; the last rank
watches the first. Files are used because the process group's store is in rank 0, which may be the one that hangs.

No clocks are compared: a rank hangs if its counter stays the same over several checks and `heartbeat_timeout_seconds` of
the watching rank. If the file system stalls or the whole job is suspended, no checks are made and none fails.

Not detected: a rank whose main thread hangs while its other threads run. `timeout_seconds` ends that; then ranks that
have ended, or have done fewer steps than others, are reported.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from trainer.errors import UserError
from trainer.runtime import directory_lock as locks
from trainer.runtime import distributed, terminal
from trainer.runtime.directory_lock import DirectoryLock
from trainer.runtime.exit_codes import EXIT_REQUEUE
from trainer.runtime.process_identity import ProcessIdentity
from trainer.settings import TrainSettings
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory

_CHECKS = 10  # within heartbeat_timeout_seconds
_RECORD_BYTES = 1024
_MIN_WRITE_SECONDS = 1.0  # between two records of steps
_VERDICT_NAME = "ended.json"
_EXIT_SECONDS = 5.0  # for other ranks of this host to end by themselves


@contextlib.contextmanager
def run_guard(run: RunDirectory, settings: TrainSettings) -> Iterator[Watchdog]:
    """Collective. Context manager that holds the run's lock and yields a started watchdog.

    Raises UserError on every rank if another job holds the lock, naming that job.
    """
    lock = DirectoryLock(run.lock, None)
    with distributed.errors_on_all_ranks(lambda problem: f"{run.lock} cannot be created: {problem}"):
        if distributed.is_main_process():
            lock = locks.acquire(run.lock)
    try:
        watchdog = Watchdog(run, settings.heartbeat_timeout_seconds, lock)
        watchdog.start()
        is_regular = False
        try:
            yield watchdog
            is_regular = True
        except UserError:
            is_regular = True  # raised on all ranks
            raise
        except Exception:
            watchdog.report_stragglers()
            raise
        finally:
            watchdog.stop(is_regular)
    finally:
        lock.release()


class Watchdog:
    """Heartbeat of this rank, and check of the next rank's heartbeat, in a thread."""

    def __init__(self, run: RunDirectory, heartbeat_timeout_seconds: float, lock: DirectoryLock):
        environment = distributed.environment()
        self._folder, self._lock, self._rank = run.heartbeats, lock, environment.rank
        self._world_size = environment.world_size
        self._timeout_seconds = heartbeat_timeout_seconds
        self._interval = min(
            locks.HEARTBEAT_SECONDS, (heartbeat_timeout_seconds or locks.HEARTBEAT_SECONDS) / _CHECKS
        )
        self._next_rank = (self._rank + 1) % self._world_size
        self._is_watching = bool(heartbeat_timeout_seconds) and self._world_size > 1
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._token, self._step, self._beats, self._written_at = "", 0, 0, 0.0
        self._next_beats, self._changed_at, self._unchanged_checks = -1, time.monotonic(), 0

    def start(self) -> None:
        """Collective. Start the thread after every rank has written its first heartbeat."""
        if distributed.is_main_process():
            shutil.rmtree(self._folder, ignore_errors=True)  # left by a killed run
            self._folder.mkdir(parents=True)
        self._token = distributed.broadcast_object(secrets.token_hex(8))
        self._write_heartbeat()
        distributed.barrier()
        self._check_next_rank()
        self._thread.start()

    def report_step(self, step: int) -> None:
        """Record the number of finished steps."""
        self._step = step
        if time.monotonic() - self._written_at > _MIN_WRITE_SECONDS:
            with contextlib.suppress(OSError):
                self._write_heartbeat()

    def check_lock(self) -> None:
        """Collective. Raise UserError if another job has taken over the lock; nothing may be written then."""
        distributed.raise_on_all_ranks(self._lock.taken_over_by())

    def report_stragglers(self) -> None:
        """Log, after a failed collective, the ranks that have ended or have done fewer steps than others."""
        records = self._read_heartbeats()
        max_step = max((record["step"] for record in records.values()), default=0)
        for rank, record in records.items():
            if record["step"] < max_step or ProcessIdentity(**record["process"]).is_alive() is False:
                terminal.error_on_any_rank(f"rank {self._rank}: {_describe(rank, record)}")

    def stop(self, is_regular: bool) -> None:
        """End the heartbeat. Only a regular end removes its file: after another the next check must fail."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=_EXIT_SECONDS)
        if not is_regular:
            return
        with contextlib.suppress(OSError):
            (self._folder / _heartbeat_name(self._rank)).unlink(missing_ok=True)
            self._folder.rmdir()  # succeeds on the last rank

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self._write_heartbeat()
                self._lock.heartbeat()
                ended = self._read(_VERDICT_NAME)  # written by another rank
                verdict = ended["verdict"] if ended else self._check_next_rank()
            except (OSError, ValueError):
                continue  # a file system error says nothing about a rank
            if verdict and not self._stopped.is_set():
                self._end(verdict)

    def _write_heartbeat(self) -> None:
        """Overwrite the record in place with one small write of constant size."""
        self._beats, self._written_at = self._beats + 1, time.monotonic()
        record = {
            "token": self._token, "beats": self._beats, "step": self._step,
            "process": asdict(ProcessIdentity.of_this_process()),
        }  # fmt: skip
        path = self._folder / _heartbeat_name(self._rank)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, json.dumps(record).ljust(_RECORD_BYTES).encode(), 0)
        finally:
            os.close(descriptor)

    def _check_next_rank(self) -> str | None:
        """Return a message if the next rank hangs, else None."""
        if not self._is_watching:
            return None
        record = self._read(_heartbeat_name(self._next_rank))
        beats = record["beats"] if record else -1
        if beats != self._next_beats or record is None:  # without a record it ended regularly
            self._next_beats, self._changed_at, self._unchanged_checks = beats, time.monotonic(), 0
            return None
        self._unchanged_checks += 1
        seconds = time.monotonic() - self._changed_at
        if self._unchanged_checks < _CHECKS or seconds < self._timeout_seconds:
            return None
        return f"{_describe(self._next_rank, record)}, {seconds:.0f} s ago; the run ends here (heartbeat_timeout_seconds)"

    def _end(self, verdict: str) -> None:
        """End this process. The rank that detected the hang first writes the verdict and kills hung ranks of its host."""
        path = self._folder / _VERDICT_NAME
        if not path.exists():
            terminal.error_on_any_rank(f"error: {verdict}")
            with contextlib.suppress(OSError):
                atomic_dir.write_text(path, json.dumps({"token": self._token, "verdict": verdict}) + "\n")
            self._kill_ranks_of_host()
        self._lock.release()
        os._exit(EXIT_REQUEUE)

    def _kill_ranks_of_host(self) -> None:
        """Kill (SIGKILL) the ranks of this host that do not end in time: without a launcher nothing else would.

        A stopped process does not react to SIGTERM.
        """
        others = [ProcessIdentity(**record["process"]) for record in self._read_heartbeats().values()]
        deadline = time.monotonic() + max(_EXIT_SECONDS, 3 * self._interval)
        while others := [other for other in others if other.pid != os.getpid() and other.is_alive()]:
            if time.monotonic() > deadline:
                for other in others:
                    with contextlib.suppress(OSError):
                        os.kill(other.pid, signal.SIGKILL)
                return
            time.sleep(0.1)

    def _read_heartbeats(self) -> dict[int, dict[str, Any]]:
        """Return the last heartbeats of this run by rank."""
        found = {rank: self._read(_heartbeat_name(rank)) for rank in range(self._world_size)}
        return {rank: record for rank, record in found.items() if record}

    def _read(self, name: str) -> dict[str, Any] | None:
        """Return the content of a file that a rank of this run wrote, else None."""
        try:
            found: dict[str, Any] = json.loads((self._folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found if found.get("token") == self._token else None


def _heartbeat_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _describe(rank: int, record: dict[str, Any]) -> str:
    process = ProcessIdentity(**record["process"])
    state = "is gone" if process.is_alive() is False else "has not moved"
    return f"rank {rank} ({process}) {state} since step {record['step']}"
