"""Two processes in one directory: exactly one proceeds, the other says who holds it; a lock whose owner is gone is taken."""

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

HOLD = """
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


def _taker(run: Path, start: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run), str(start)],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    while "warning: " in (line := process.stdout.readline()):
        pass
    return line.strip()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_takers_exactly_one_wins(tmp_path: Path, stale: bool) -> None:
    """Also of a lock whose owner was killed, which all of them would like to take over."""
    run, start = tmp_path / "run", tmp_path / "start"
    if stale:
        dead = _taker(run, REPOSITORY)
        assert _line(dead) == "ready" and _line(dead) == "holds"
        dead.kill()
        dead.wait()
        assert (RunDirectory(run).lock / "owner.json").exists()
    takers = [_taker(run, start) for _ in range(4)]
    assert [_line(taker) for taker in takers] == ["ready"] * 4
    start.touch()
    said = [_line(taker) for taker in takers]
    assert said.count("holds") == 1, said
    winner = takers[said.index("holds")]
    expected = rf"{re.escape(str(run))} is in use: host \S+, pid {winner.pid}, since \d{{4}}-"
    assert all(re.search(expected, line) for line in said if line != "holds"), said
    for taker in takers:
        taker.communicate("")
    assert not RunDirectory(run).lock.exists()  # released


def _held_by(run: RunDirectory, process: ProcessIdentity) -> None:
    assert locks._install(run.lock, LockOwner(process, "token-of-the-other", "2026-01-01 00:00:00 +0000"))


def _mine(**changes: object) -> ProcessIdentity:
    return replace(ProcessIdentity.of_this_process(), **changes)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_WATCH_SECONDS", 0.5)


def test_a_process_number_used_again_is_another_process(
    run: RunDirectory, capsys: pytest.CaptureFixture
) -> None:
    _held_by(run, _mine(started=1))
    locks.acquire(run.lock).release()
    assert "took over" in capsys.readouterr().out


def test_the_same_slurm_job_started_again_takes_over_at_once(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _held_by(run, _mine(host="other", space="elsewhere", job="77", restarts=0))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(UserError, match="in use: Slurm job 77, host other"):
        locks.acquire(run.lock)  # another step of the job that runs: a second start by mistake
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    locks.acquire(run.lock).release()
    assert "this is the same Slurm job, started again" in capsys.readouterr().out


def test_a_silent_owner_elsewhere_is_taken_over_and_a_beating_one_is_not(
    run: RunDirectory, quick: None
) -> None:
    _held_by(run, _mine(space="elsewhere"))
    owner = run.lock / "owner.json"
    with pytest.raises(UserError, match="is in use"):
        locks.acquire(run.lock)
    os.utime(owner, (time.time() - 1000, time.time() - 1000))
    locks.acquire(run.lock).release()
    assert not run.lock.exists()


@pytest.mark.parametrize("jump", [-1000.0, 1000.0])
def test_a_jump_of_the_clock_takes_no_lock_from_a_living_owner(
    run: RunDirectory, quick: None, jump: float, capsys: pytest.CaptureFixture
) -> None:
    """The owner's signs of life are stamped far in the past or in the future, but they go on while we watch."""
    _held_by(run, _mine(space="elsewhere"))
    code = "import os, sys, time\nwhile True: now = time.time() + float(sys.argv[2]); os.utime(sys.argv[1], (now, now)); time.sleep(0.02)"
    owner = run.lock / "owner.json"
    beating = subprocess.Popen([sys.executable, "-c", code, str(owner), str(jump)])
    try:
        while abs(owner.stat().st_mtime - time.time()) < 500:
            time.sleep(0.01)
        with pytest.raises(UserError, match="is in use"):
            locks.acquire(run.lock)
    finally:
        beating.kill()
        beating.wait()
    assert ("no sign of life" in capsys.readouterr().out) == (jump < 0)  # it was suspected, and watched


def test_a_lock_in_use_shows_signs_of_life(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    with locks.locked(run.lock):
        owner = run.lock / "owner.json"
        os.utime(owner, (0, 0))
        deadline = time.monotonic() + 60
        while owner.stat().st_mtime == 0:
            assert time.monotonic() < deadline, "no sign of life"
            time.sleep(0.01)
        found = locks.current_owner(run.lock)
        assert found is not None and found.process == ProcessIdentity.of_this_process()
    assert locks.current_owner(run.lock) is None


def test_a_damaged_lock_is_nobodys_to_take(run: RunDirectory) -> None:
    _held_by(run, _mine())
    (run.lock / "owner.json").write_text("{")
    with pytest.raises(UserError, match=r"owner\.json cannot be read.*remove"):
        locks.acquire(run.lock)


def test_a_lost_lock_is_noticed_and_not_released(run: RunDirectory) -> None:
    lock = locks.acquire(run.lock)
    assert lock.taken_over_by() is None
    held = json.loads((run.lock / "owner.json").read_text())
    other = LockOwner(_mine(host="thief"), "another-token", "2026-01-01 00:00:00 +0000")
    (run.lock / "owner.json").write_text(json.dumps({**held, **asdict(other)}))
    assert "was taken from this job by" in (lock.taken_over_by() or "") and "thief" in (
        lock.taken_over_by() or ""
    )
    lock.release()
    assert run.lock.exists()


def test_a_stopped_owner_keeps_its_lock(run: RunDirectory, tmp_path: Path) -> None:
    """A stopped process lives: it could go on at any moment."""
    holder = _taker(run.path, REPOSITORY)
    assert _line(holder) == "ready" and _line(holder) == "holds"
    holder.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match=f"pid {holder.pid}"):
            locks.acquire(run.lock)
    finally:
        holder.send_signal(signal.SIGCONT)
        holder.communicate("")
