"""Who hangs? A rank that shows no sign of life is named, with its last step, and the run is ended everywhere.

A stopped rank leaves the others in a collective until `timeout_seconds`, and then they know that somebody was late, not
who. So a thread of every rank counts up a number in a small file, and looks at the number of the next rank; the last
rank looks at the first. Files, because the process group's store lives in rank 0, which may be the one that hangs.

No clock is compared with another: a rank is silent if its number stayed the same over so many looks of ours. If the
file system stalls, or the whole job is suspended, we do not look either, and nobody is accused.

What this does not see: a rank whose main thread waits for ever while its threads run. That ends by `timeout_seconds`;
then ranks that had done fewer steps than others, or are gone, are named.
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
from pathlib import Path
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

_LOOKS = 10  # within heartbeat_timeout_seconds
_RECORD_BYTES = 1024
_WRITE_EVERY_SECONDS = 1.0  # of steps; shorter ones are told with the next sign of life
_LEAVING_SECONDS = 5.0  # the others of this host may end by themselves for so long


@contextlib.contextmanager
def run_guard(run: RunDirectory, settings: TrainSettings) -> Iterator[Watchdog]:
    """Collective. Hold the run's lock and watch over its ranks. Raises UserError if another job holds the run."""
    lock = _take(run.lock)
    try:
        watchdog = Watchdog(run, settings.heartbeat_timeout_seconds, lock)
        watchdog.start()
        in_order = False
        try:
            yield watchdog
            in_order = True
        except UserError:
            in_order = True  # raised on all ranks
            raise
        except Exception:
            watchdog.report_stragglers()
            raise
        finally:
            watchdog.stop(in_order)
    finally:
        lock.release()


def _take(path: Path) -> DirectoryLock:
    """Collective. Rank 0 holds it for all. Raises UserError on every rank, naming the job that holds it, if one does."""
    lock, error = DirectoryLock(path, None), None
    if distributed.is_main_process():
        try:
            lock = locks.acquire(path)
        except UserError as problem:
            error = str(problem)
        except OSError as problem:
            error = f"{path} cannot be made: {problem}"
    distributed.raise_on_all_ranks(error)
    return lock


class Watchdog:
    """This rank's signs of life, and its look at the next one. `moved` tells the step; `start` is collective."""

    def __init__(self, run: RunDirectory, heartbeat_timeout_seconds: float, lock: DirectoryLock):
        world = distributed.environment()
        self._folder, self._lock, self._rank = run.heartbeats, lock, world.rank
        self._silence = heartbeat_timeout_seconds
        self._interval = min(
            locks.HEARTBEAT_SECONDS, (heartbeat_timeout_seconds or locks.HEARTBEAT_SECONDS) / _LOOKS
        )
        self._next = (world.rank + 1) % world.world_size
        self._watches = bool(heartbeat_timeout_seconds) and world.world_size > 1
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._live, name="watchdog", daemon=True)
        self._step, self._beats, self._seen, self._since, self._looks = 0, 0, -1, time.monotonic(), 0
        self._token, self._wrote = "", 0.0

    def start(self) -> None:
        """Collective: when it returns, every rank has given its first sign of life."""
        if distributed.is_main_process():  # of a run that was killed
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        self._token = distributed.broadcast_object(secrets.token_hex(8))
        self._beat()
        distributed.barrier()
        self._look()
        self._thread.start()

    def report_step(self, step: int) -> None:
        """So many steps are done."""
        self._step = step
        if time.monotonic() - self._wrote > _WRITE_EVERY_SECONDS:
            with contextlib.suppress(OSError):
                self._beat()

    def check_lock(self) -> None:
        """Collective. Raises UserError if another job has taken the run: nothing may be written any more."""
        distributed.raise_on_all_ranks(self._lock.taken_over_by())

    def report_stragglers(self) -> None:
        """If a collective failed: say which ranks were behind the others, or are no more."""
        others = {
            rank: record
            for rank in range(distributed.environment().world_size)
            if (record := self._read(rank))
        }
        most = max((record["step"] for record in others.values()), default=0)
        for rank, record in others.items():
            if record["step"] < most or ProcessIdentity(**record["process"]).is_alive() is False:
                terminal.error_on_any_rank(f"rank {self._rank}: {_describe(rank, record)}")

    def stop(self, in_order: bool) -> None:
        """The end of our signs of life; if it is not in order, the others shall miss them."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=_LEAVING_SECONDS)
        if not in_order:
            return
        with contextlib.suppress(OSError):
            self._path(self._rank).unlink(missing_ok=True)
            self._folder.rmdir()  # the last one succeeds

    def _live(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self._beat()
                self._lock.heartbeat()
                verdict = self._told() or (self._look() if self._watches else None)
            except (OSError, ValueError):
                continue  # the file system has trouble: that says nothing about a rank
            if verdict and not self._stopped.is_set():
                self._end(verdict)

    def _beat(self) -> None:
        """In place and of one size: no new name, no new block, a single small write."""
        self._beats, self._wrote = self._beats + 1, time.monotonic()
        record = {
            "token": self._token, "beats": self._beats, "step": self._step,
            "process": asdict(ProcessIdentity.of_this_process()),
        }  # fmt: skip
        descriptor = os.open(self._path(self._rank), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, json.dumps(record).ljust(_RECORD_BYTES).encode(), 0)
        finally:
            os.close(descriptor)

    def _look(self) -> str | None:
        """What is wrong with the next rank, if anything is."""
        record = self._read(self._next)
        beats = record["beats"] if record else -1
        if beats != self._seen or record is None:  # without a file it has left in good order
            self._seen, self._since, self._looks = beats, time.monotonic(), 0
            return None
        self._looks += 1
        silent = time.monotonic() - self._since
        if self._looks < _LOOKS or silent < self._silence:
            return None
        return f"{_describe(self._next, record)}, {silent:.0f} s ago; the run ends here (heartbeat_timeout_seconds)"

    def _end(self, verdict: str) -> None:
        """End this process; the one that found out tells the others first, and ends those of its host that cannot."""
        if not self._ended.exists():
            terminal.error_on_any_rank(f"error: {verdict}")
            with contextlib.suppress(OSError):
                atomic_dir.write_text(
                    self._ended, json.dumps({"token": self._token, "verdict": verdict}) + "\n"
                )
            self._end_others_here()
        self._lock.release()
        os._exit(EXIT_REQUEUE)

    def _told(self) -> str | None:
        """What another rank of this run has found out."""
        try:
            found = json.loads(self._ended.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return str(found["verdict"]) if found.get("token") == self._token else None

    def _end_others_here(self) -> None:
        """Launchers end what they started, but a plain start has nobody, and a stopped process hears no SIGTERM."""
        records = [
            record for rank in range(distributed.environment().world_size) if (record := self._read(rank))
        ]
        others = [ProcessIdentity(**record["process"]) for record in records]
        deadline = time.monotonic() + max(_LEAVING_SECONDS, 3 * self._interval)
        while others := [other for other in others if other.pid != os.getpid() and other.is_alive()]:
            if time.monotonic() > deadline:
                for other in others:
                    with contextlib.suppress(OSError):
                        os.kill(other.pid, signal.SIGKILL)
                return
            time.sleep(0.1)

    def _read(self, rank: int) -> dict[str, Any] | None:
        """The last sign of life of a rank of this run."""
        try:
            record = json.loads(self._path(rank).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return record if record["token"] == self._token else None

    @property
    def _ended(self) -> Path:
        return self._folder / "ended.json"

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"


def _describe(rank: int, record: dict[str, Any]) -> str:
    process = ProcessIdentity(**record["process"])
    state = "is gone" if process.is_alive() is False else "has not moved"
    return f"rank {rank} ({process}) {state} since step {record['step']}"
