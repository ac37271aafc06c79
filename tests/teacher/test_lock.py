"""One process writes: a second one is told who the first is; a dead one's lock is taken over by exactly one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trainer.errors import UserError
from trainer.teacher.lock import only_one

HOLD = """
import sys, time
from pathlib import Path
from trainer.errors import UserError
from trainer.teacher.lock import only_one
folder = Path(sys.argv[1])
while not (folder / "go").exists():
    time.sleep(0.01)
try:
    with only_one(folder / "process.json"):
        (folder / f"held-{sys.argv[2]}").touch()
        while not (folder / "end").exists():
            time.sleep(0.01)
except UserError:
    (folder / f"refused-{sys.argv[2]}").touch()
"""


def start(folder: Path, name: str = "0") -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", HOLD, str(folder), name])


def wait_for(folder: Path, pattern: str, number: int = 1) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob(pattern))) < number:
        assert time.monotonic() < deadline, f"{pattern} did not appear {number} times"
        time.sleep(0.01)


def test_a_second_process_is_refused_and_a_dead_one_is_succeeded(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "go").touch()
    process = start(tmp_path)
    wait_for(tmp_path, "held-0")
    lock = tmp_path / "process.json"
    with pytest.raises(UserError, match=f"process {process.pid} on {socket.gethostname()}"), only_one(lock):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lock.exists()
    with only_one(lock):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"process {os.getpid()}"), only_one(lock):
            pass
    assert "taking over" in capsys.readouterr().out
    assert not list(tmp_path.glob("*process.json*"))


def test_of_many_that_find_a_dead_holder_one_takes_over(tmp_path: Path) -> None:
    dead = {"host": socket.gethostname(), "pid": 2**22 - 1, "started": 1.0}
    (tmp_path / "process.json").write_text(json.dumps(dead))
    processes = [start(tmp_path, str(number)) for number in range(4)]
    (tmp_path / "go").touch()
    wait_for(tmp_path, "held-*")
    wait_for(tmp_path, "refused-*", 3)
    (tmp_path / "end").touch()
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert len(list(tmp_path.glob("held-*"))) == 1


def test_a_number_that_another_process_got_later_is_not_the_holder(tmp_path: Path) -> None:
    lock = tmp_path / "process.json"
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time() - 100}
    lock.write_text(json.dumps(mine))
    with only_one(lock):
        pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"host": "another", "pid": 1, "started": 1.0}), "process 1 on another.*delete"),
        ("{", "no lock of ours"),
    ],
)
def test_nobody_can_tell(tmp_path: Path, content: str, message: str) -> None:
    lock = tmp_path / "process.json"
    lock.write_text(content)
    with pytest.raises(UserError, match=message), only_one(lock):
        pass
    assert lock.read_text() == content
