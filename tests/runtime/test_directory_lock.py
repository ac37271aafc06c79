"""Directory locks: exactly one of several processes acquires one, and a lock whose owner is gone is taken over."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY
from trainer.errors import UserError
from trainer.runtime import directory_lock as locks
from trainer.runtime.directory_lock import LockOwner
from trainer.runtime.process_identity import ProcessIdentity
from trainer.storage.run_directory import RunDirectory

ACQUIRE_AND_HOLD = """
import sys, time
from pathlib import Path
from trainer.runtime import directory_lock
from trainer.errors import UserError
start = Path(sys.argv[2])
print("ready", flush=True)
while not start.exists():
    time.sleep(0.001)
try:
    with directory_lock.locked(Path(sys.argv[1]) / "lock"):
        print("holds", flush=True)
        sys.stdin.read()
except UserError as error:
    print(error, flush=True)
"""


def _start_process(run: Path, start: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ACQUIRE_AND_HOLD, str(run), str(start)],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    while "warning: " in (line := process.stdout.readline()):
        pass
    return line.strip()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_takers_exactly_one_wins(tmp_path: Path, stale: bool) -> None:
    """Stale: the lock of a killed owner, which all processes try to take over."""
    run, start = tmp_path / "run", tmp_path / "start"
    if stale:
        killed = _start_process(run, REPOSITORY)
        assert _read_line(killed) == "ready" and _read_line(killed) == "holds"
        killed.kill()
        killed.wait()
        assert (RunDirectory(run).lock / "owner.json").exists()
    processes = [_start_process(run, start) for _ in range(4)]
    assert [_read_line(process) for process in processes] == ["ready"] * 4
    start.touch()
    lines = [_read_line(process) for process in processes]
    assert lines.count("holds") == 1, lines
    winner = processes[lines.index("holds")]
    expected = rf"{re.escape(str(run))} is in use: host \S+, pid {winner.pid}, since \d{{4}}-"
    assert all(re.search(expected, line) for line in lines if line != "holds"), lines
    for process in processes:
        process.communicate("")
    assert not RunDirectory(run).lock.exists()  # released


def _install_lock(run: RunDirectory, process: ProcessIdentity) -> None:
    assert locks._install(run.lock, LockOwner(process, "token-of-the-other", "2026-01-01 00:00:00 +0000"))


def _this_process(**changes: object) -> ProcessIdentity:
    return replace(ProcessIdentity.of_this_process(), **changes)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


@pytest.fixture
def short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_WATCH_SECONDS", 0.5)


def test_a_reused_pid_is_another_process(run: RunDirectory, capsys: pytest.CaptureFixture) -> None:
    _install_lock(run, _this_process(started=1))
    locks.acquire(run.lock).release()
    assert "took over" in capsys.readouterr().out


def test_a_restarted_slurm_job_takes_over_immediately(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _install_lock(run, _this_process(host="other", space="elsewhere", job="77", restarts=0))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(UserError, match="in use: Slurm job 77, host other"):
        locks.acquire(run.lock)  # another step of the running job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    locks.acquire(run.lock).release()
    assert "this is the same Slurm job, started again" in capsys.readouterr().out


def test_a_remote_owner_is_taken_over_only_without_heartbeats(run: RunDirectory, short_watch: None) -> None:
    _install_lock(run, _this_process(space="elsewhere"))
    owner = run.lock / "owner.json"
    with pytest.raises(UserError, match="is in use"):
        locks.acquire(run.lock)
    os.utime(owner, (time.time() - 1000, time.time() - 1000))
    locks.acquire(run.lock).release()
    assert not run.lock.exists()


@pytest.mark.parametrize("jump", [-1000.0, 1000.0])
def test_a_jump_of_the_clock_takes_no_lock_from_a_living_owner(
    run: RunDirectory, short_watch: None, jump: float, capsys: pytest.CaptureFixture
) -> None:
    """The owner's heartbeats have times far in the past or in the future, but continue while the lock is watched."""
    _install_lock(run, _this_process(space="elsewhere"))
    code = "import os, sys, time\nwhile True: now = time.time() + float(sys.argv[2]); os.utime(sys.argv[1], (now, now)); time.sleep(0.02)"
    owner = run.lock / "owner.json"
    heartbeats = subprocess.Popen([sys.executable, "-c", code, str(owner), str(jump)])
    try:
        while abs(owner.stat().st_mtime - time.time()) < 500:
            time.sleep(0.01)
        with pytest.raises(UserError, match="is in use"):
            locks.acquire(run.lock)
    finally:
        heartbeats.kill()
        heartbeats.wait()
    assert ("no heartbeat for" in capsys.readouterr().out) == (jump < 0)  # looked stale and was watched


def test_a_held_lock_sends_heartbeats(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    with locks.locked(run.lock):
        owner = run.lock / "owner.json"
        os.utime(owner, (0, 0))
        deadline = time.monotonic() + 60
        while owner.stat().st_mtime == 0:
            assert time.monotonic() < deadline, "no heartbeat"
            time.sleep(0.01)
        found = locks.current_owner(run.lock)
        assert found is not None and found.process == ProcessIdentity.of_this_process()
    assert locks.current_owner(run.lock) is None


def test_a_lock_with_an_invalid_owner_file_is_not_taken_over(run: RunDirectory) -> None:
    _install_lock(run, _this_process())
    (run.lock / "owner.json").write_text("{")
    with pytest.raises(UserError, match=r"owner\.json cannot be read.*remove"):
        locks.acquire(run.lock)


def test_a_lost_lock_is_reported_and_not_released(run: RunDirectory) -> None:
    lock = locks.acquire(run.lock)
    assert lock.taken_over_by() is None
    record = json.loads((run.lock / "owner.json").read_text())
    other = LockOwner(_this_process(host="thief"), "another-token", "2026-01-01 00:00:00 +0000")
    (run.lock / "owner.json").write_text(json.dumps({**record, **asdict(other)}))
    message = lock.taken_over_by()
    assert message and "was taken from this job by" in message and "thief" in message
    lock.release()
    assert run.lock.exists()


def test_a_stopped_owner_keeps_its_lock(run: RunDirectory, tmp_path: Path) -> None:
    """A stopped process may be continued at any moment."""
    owner = _start_process(run.path, REPOSITORY)
    assert _read_line(owner) == "ready" and _read_line(owner) == "holds"
    owner.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match=f"pid {owner.pid}"):
            locks.acquire(run.lock)
    finally:
        owner.send_signal(signal.SIGCONT)
        owner.communicate("")
