"""Atomic publication and replacement of directories and files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.storage import atomic_dir


def _make(final: Path, content: bytes = b"hello", **facts: object) -> None:
    with atomic_dir.atomic_directory(final, "test", dict(facts)) as staging:
        (staging / "folder").mkdir()
        (staging / "folder" / "file.bin").write_bytes(content)


def test_a_published_directory_is_read_and_verified(tmp_path: Path) -> None:
    _make(tmp_path / "done", answer=42)
    assert atomic_dir.read_manifest(tmp_path / "done", "test")["facts"] == {"answer": 42}
    atomic_dir.verify_digests(tmp_path / "done")
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_an_exception_removes_the_staging_directory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_dir.atomic_directory(tmp_path / "done", "test", {}) as staging:
        (staging / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    _make(tmp_path / "done")
    file = tmp_path / "done" / "folder" / "file.bin"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"hellO" if damage == "flipped" else b"hell")
    with pytest.raises(UserError, match=r"file\.bin"):
        atomic_dir.verify_digests(tmp_path / "done")


def test_unfinished_and_missing_directories_have_different_errors(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    with pytest.raises(UserError, match="not finished"):
        atomic_dir.read_manifest(tmp_path / "half")
    with pytest.raises(UserError, match="does not exist"):
        atomic_dir.read_manifest(tmp_path / "nowhere")


def test_another_kind_and_an_invalid_manifest_are_refused(tmp_path: Path) -> None:
    _make(tmp_path / "done")
    with pytest.raises(UserError, match="expected shards made by"):
        atomic_dir.read_manifest(tmp_path / "done", "shards")
    (tmp_path / "done" / atomic_dir.MANIFEST).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        atomic_dir.read_manifest(tmp_path / "done")


RACER = """
import sys, pathlib
from trainer.storage import atomic_dir
final, name = pathlib.Path(sys.argv[1]), sys.argv[2]
try:
    with atomic_dir.atomic_directory(final, "test", {"winner": name}) as staging:
        (staging / "file").write_text(name * 1000)
    print("won")
except atomic_dir.ArtifactExistsError:
    print("lost")
"""


def test_of_several_builders_one_wins_and_none_is_mixed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACER, str(tmp_path / "done")]
    racers = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(6)]
    printed = [racer.communicate()[0].strip() for racer in racers]
    assert sorted(printed) == ["lost"] * 5 + ["won"]
    winner = atomic_dir.read_manifest(tmp_path / "done")["facts"]["winner"]
    assert printed[int(winner)] == "won"
    assert (tmp_path / "done" / "file").read_text() == winner * 1000
    atomic_dir.verify_digests(tmp_path / "done")
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


KILLED = """
import sys, pathlib, time
from trainer.storage import atomic_dir
with atomic_dir.atomic_directory(pathlib.Path(sys.argv[1]), "test", {}) as staging:
    (staging / "file").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_builder_publishes_nothing_and_its_files_are_removed_later(tmp_path: Path) -> None:
    builder = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "done")], stdout=subprocess.PIPE, text=True
    )
    assert builder.stdout is not None
    assert builder.stdout.readline() == "writing\n"
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert not (tmp_path / "done").exists()
    (leftover,) = tmp_path.iterdir()
    _make(tmp_path / "done")
    assert leftover.exists()  # it may belong to a live builder on another node
    yesterday = time.time() - 2 * 24 * 3600
    os.utime(leftover, (yesterday, yesterday))
    with pytest.raises(atomic_dir.ArtifactExistsError):
        _make(tmp_path / "done")
    assert not leftover.exists()


def test_a_living_builder_is_left_alone_however_old_its_files_look(tmp_path: Path) -> None:
    """The clock may have jumped, and a directory's mtime does not change while one long file in it is written."""
    with atomic_dir.atomic_directory(tmp_path / "done", "test", {}) as staging:
        (staging / "file").write_text("first")
        yesterday = time.time() - 2 * 24 * 3600
        os.utime(staging, (yesterday, yesterday))
        another = atomic_dir.create_staging(tmp_path / "done")  # removes abandoned directories
        shutil.rmtree(another)
        (staging / "file").write_text("second")
    assert (tmp_path / "done" / "file").read_text() == "second"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_replace_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    if not can_exchange:  # as on NFS
        monkeypatch.setattr(atomic_dir, "_exchange_names", lambda one, other: False)
    _make(tmp_path / "old", b"old")
    _make(tmp_path / "new", b"new")
    atomic_dir.replace_directory(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "old" / "folder" / "file.bin").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_replaced_directory_always_exists(tmp_path: Path) -> None:
    _make(tmp_path / "one")
    _make(tmp_path / "other")
    if not atomic_dir._exchange_names(tmp_path / "one", tmp_path / "other"):
        pytest.skip(f"the file system of {tmp_path} cannot exchange two names")
    missing, finished = [], threading.Event()

    def poll() -> None:
        while not finished.is_set():
            if not atomic_dir.is_complete(tmp_path / "one"):
                missing.append(time.time())

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        for number in range(100):
            _make(tmp_path / f"new-{number}")
            atomic_dir.replace_directory(tmp_path / "one", tmp_path / f"new-{number}")
    finally:
        finished.set()
        thread.join()
    assert not missing


def test_write_text_replaces_the_file(tmp_path: Path) -> None:
    atomic_dir.write_text(tmp_path / "a" / "file", "one")
    atomic_dir.write_text(tmp_path / "a" / "file", "two")
    assert (tmp_path / "a" / "file").read_text() == "two"
    assert len(list((tmp_path / "a").iterdir())) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_publish_replaces_when_the_new_directory_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    def write(text: str) -> None:
        with atomic_dir.atomic_directory(tmp_path / "done", "test", {}, replace=True) as staging:
            (staging / "file").write_text(text)

    write("old")
    if fails:
        full = OSError("no space left on device")
        monkeypatch.setattr(atomic_dir, "replace_directory", lambda old, new: (_ for _ in ()).throw(full))
        with pytest.raises(OSError, match="no space"):
            write("new")
    else:
        write("new")
    assert (tmp_path / "done" / "file").read_text() == ("old" if fails else "new")
    assert [path.name for path in tmp_path.iterdir()] == ["done"]
