"""Detection of hung ranks by heartbeat files. The hung rank is reported with its last step, and all ranks end.

If a rank hangs, the other ranks wait for `timeout_seconds` in a collective, whose error does not name the hung rank.
So a thread of every rank increments a counter in a small file and watches the counter of the next rank. The last rank
watches rank 0. Counters are in files because the process group's store is in rank 0, which may itself hang.

Clocks of different hosts are not compared. A rank counts as hung if its counter stays the same during several checks
and during `heartbeat_timeout_seconds` on the watching rank's clock. If the file system stalls or the whole job is
suspended, no checks run, so no rank is reported.

If only the main thread of a rank hangs, the heartbeat continues, so the hang is not detected. After `timeout_seconds`,
the collective of the other ranks fails. Then the watchdog reports ranks that have ended or have done fewer steps than others.
"""

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

_CHECKS = 10  # a counter must be unchanged in this many checks before its rank counts as hung
_RECORD_BYTES = 1024
_MIN_WRITE_SECONDS = 1.0  # minimum age of the last heartbeat write before `report_step` writes again
_VERDICT_NAME = "ended.json"
_EXIT_SECONDS = 5.0  # minimum wait before other ranks are killed; maximum wait for the thread


@contextlib.contextmanager
def run_guard(run: RunDirectory, settings: TrainSettings) -> Iterator["Watchdog"]:
    """Collective. Context manager that holds the run's lock and yields a started watchdog.

    Raises UserError on every rank if another job holds the lock. The message names that job.
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
            is_regular = True  # UserError is raised on all ranks together, so no rank may be reported as hung
            raise
        except Exception:
            watchdog.report_stragglers()
            raise
        finally:
            watchdog.stop(is_regular)
    finally:
        lock.release()


class Watchdog:
    """Thread that writes this rank's heartbeat and checks the heartbeat of the next rank."""

    def __init__(self, run: RunDirectory, heartbeat_timeout_seconds: float, lock: DirectoryLock):
        environment = distributed.environment()
        self._folder, self._lock, self._rank = run.heartbeats, lock, environment.rank
        self._world_size = environment.world_size
        self._timeout_seconds = heartbeat_timeout_seconds
        longest = locks.HEARTBEAT_SECONDS
        self._interval = min(longest, (heartbeat_timeout_seconds or longest) / _CHECKS)

        self._next_rank = (self._rank + 1) % self._world_size
        self._is_watching = bool(heartbeat_timeout_seconds) and self._world_size > 1
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._token, self._step, self._beats, self._written_at = "", 0, 0, 0.0
        self._next_beats, self._changed_at, self._unchanged_checks = -1, time.monotonic(), 0

    def start(self) -> None:
        """Collective. Start the thread after every rank has written its first heartbeat."""
        if distributed.is_main_process():
            shutil.rmtree(self._folder, ignore_errors=True)  # files of a killed run
            self._folder.mkdir(parents=True)
        self._token = distributed.broadcast_object(secrets.token_hex(8))
        self._write_heartbeat()
        distributed.barrier()
        self._check_next_rank()
        self._thread.start()

    def report_step(self, step: int) -> None:
        self._step = step
        if time.monotonic() - self._written_at > _MIN_WRITE_SECONDS:
            with contextlib.suppress(OSError):
                self._write_heartbeat()

    def check_lock(self) -> None:
        """Collective. Raise UserError if this job no longer holds the lock, because two jobs must not write the same files."""
        distributed.raise_on_all_ranks(self._lock.taken_over_by())

    def report_stragglers(self) -> None:
        """After a failed collective, log the ranks that have ended or have done fewer steps than other ranks."""
        records = self._read_heartbeats()
        max_step = max((record["step"] for record in records.values()), default=0)
        for rank, record in records.items():
            if record["step"] < max_step or ProcessIdentity(**record["process"]).is_alive() is False:
                terminal.error_on_any_rank(f"rank {self._rank}: {_describe(rank, record)}")

    def stop(self, is_regular: bool) -> None:
        """End the thread. If `is_regular`, remove the heartbeat file. If not, the file stays, so another rank reports this rank."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=_EXIT_SECONDS)
        if is_regular:
            with contextlib.suppress(OSError):
                (self._folder / _heartbeat_name(self._rank)).unlink(missing_ok=True)
                self._folder.rmdir()  # succeeds only on the last rank that stops

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self._write_heartbeat()
                self._lock.heartbeat()
                ended = self._read(_VERDICT_NAME)  # written by another rank
                verdict = ended["verdict"] if ended else self._check_next_rank()
            except (OSError, ValueError):
                continue  # a file system error does not mean that a rank hangs
            if verdict and not self._stopped.is_set():
                self._end(verdict)

    def _write_heartbeat(self) -> None:
        """Overwrite this rank's heartbeat file in place, with one write of constant size."""
        self._beats, self._written_at = self._beats + 1, time.monotonic()
        process = asdict(ProcessIdentity.of_this_process())
        record = {"token": self._token, "beats": self._beats, "step": self._step, "process": process}
        descriptor = os.open(self._folder / _heartbeat_name(self._rank), os.O_WRONLY | os.O_CREAT, 0o644)
        with open(descriptor, "wb", buffering=0) as file:
            file.write(json.dumps(record).ljust(_RECORD_BYTES).encode())

    def _check_next_rank(self) -> str | None:
        """Return a message if the next rank hangs, else None."""
        if not self._is_watching:
            return None
        record = self._read(_heartbeat_name(self._next_rank))
        beats = record["beats"] if record else -1
        if beats != self._next_beats or record is None:  # no record: the next rank ended regularly
            self._next_beats, self._changed_at, self._unchanged_checks = beats, time.monotonic(), 0
            return None
        self._unchanged_checks += 1
        seconds = time.monotonic() - self._changed_at
        if self._unchanged_checks < _CHECKS or seconds < self._timeout_seconds:
            return None
        return f"{_describe(self._next_rank, record)}, {seconds:.0f} s ago; the run ends here (heartbeat_timeout_seconds)"

    def _end(self, verdict: str) -> None:
        """End this process. The first rank that ends also writes `verdict` to ended.json and kills hung ranks of its host."""
        path = self._folder / _VERDICT_NAME
        if not path.exists():
            terminal.error_on_any_rank(f"error: {verdict}")
            with contextlib.suppress(OSError):
                atomic_dir.write_text(path, json.dumps({"token": self._token, "verdict": verdict}) + "\n")
            self._kill_ranks_of_host()
        self._lock.release()
        os._exit(EXIT_REQUEUE)

    def _kill_ranks_of_host(self) -> None:
        """Kill the ranks of this host that do not end in time, because there may be no launcher that kills them.

        The signal is SIGKILL, because a stopped process does not react to SIGTERM.
        """
        ranks = [ProcessIdentity(**record["process"]) for record in self._read_heartbeats().values()]
        deadline = time.monotonic() + max(_EXIT_SECONDS, 3 * self._interval)
        while ranks := [rank for rank in ranks if rank.pid != os.getpid() and rank.is_alive()]:
            if time.monotonic() > deadline:
                for rank in ranks:
                    with contextlib.suppress(OSError):
                        os.kill(rank.pid, signal.SIGKILL)
                return
            time.sleep(0.1)

    def _read_heartbeats(self) -> dict[int, dict[str, Any]]:
        """Return a dict rank -> last heartbeat. Ranks that ended regularly are missing."""
        ranks = range(self._world_size)
        return {rank: record for rank in ranks if (record := self._read(_heartbeat_name(rank)))}

    def _read(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object in a file, or None if the file is missing or from an earlier start of the run."""
        try:
            record: dict[str, Any] = json.loads((self._folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return record if record.get("token") == self._token else None


def _heartbeat_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _describe(rank: int, record: dict[str, Any]) -> str:
    process = ProcessIdentity(**record["process"])
    state = "is gone" if process.is_alive() is False else "has not moved"
    return f"rank {rank} ({process}) {state} since step {record['step']}"
