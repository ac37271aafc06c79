"""`make study` and Ctrl-C, with a real make and a stand-in for tools/study.py."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDY = """
import signal, sys, time
def save(*_):
    time.sleep(0.5)
    open("saved", "w").close()
    print("interrupted; run the same command to continue")
    sys.exit(130)
signal.signal(signal.SIGINT, save)
print("running", flush=True)
time.sleep(60)
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the Makefile, an environment that is up to date, and an empty tools/study.py."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    (tmp_path / ".venv/.study").touch()
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/study.py").touch()
    return tmp_path


def start(folder: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        ["make", "study"],
        cwd=folder,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_ctrl_c_lets_the_study_save_and_is_no_error(folder: Path) -> None:
    (folder / "tools/study.py").write_text(STUDY)
    process = start(folder)
    assert process.stdout is not None
    while process.stdout.readline() not in ("running\n", ""):
        pass
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert output == "interrupted; run the same command to continue\n"
    assert (folder / "saved").exists()
    assert process.returncode == -signal.SIGINT, "make ends by the signal, so that a calling script ends too"


@pytest.mark.parametrize("status", [0, 1, 2])
def test_another_failure_is_an_error(folder: Path, status: int) -> None:
    (folder / "tools/study.py").write_text(f"raise SystemExit({status})")
    process = start(folder)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == (2 if status else 0)
    assert ("Error" in output) == bool(status)
