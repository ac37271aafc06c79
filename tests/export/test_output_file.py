"""Every byte arrives, whatever the size, the file system, and how the bytes came."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from trainer.export import output_file
from trainer.export.output_file import BUFFER_BYTES, OutputFile

SIZES = [0, 1, 4096, BUFFER_BYTES - 8, BUFFER_BYTES, BUFFER_BYTES + 1, 4 * BUFFER_BYTES + 4097]


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk, and a file system that may know no O_DIRECT."""
    if request.param == "disk":
        yield tmp_path
        return
    path = Path("/dev/shm") / f"output-file-{os.getpid()}"
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def write(path: Path, content: bytes) -> str:
    """First by `write`, then by filling what room there is, 3 MB at most."""
    with OutputFile(path) as out:
        out.write(content[:1000])
        rest = memoryview(content)[1000:]
        while rest:
            room = out.room()
            count = min(len(room), len(rest), 3_000_000)
            room[:count] = rest[:count]
            out.advance(count)
            rest = rest[count:]
        return out.finish()


@pytest.mark.parametrize("size", SIZES)
def test_the_file_is_what_was_written(folder: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    digest = write(folder / "file", content)
    assert (folder / "file").read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()


def test_blocks_that_are_larger_than_we_believe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel then refuses what it would take through its cache."""
    real, refused = os.pwrite, []

    def picky(file: int, data: memoryview, offset: int) -> int:
        if not refused:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, data, offset)

    monkeypatch.setattr(output_file.os, "pwrite", picky)
    content = np.random.default_rng(0).bytes(2 * BUFFER_BYTES + 5)
    digest = write(tmp_path / "file", content)
    assert refused and (tmp_path / "file").read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()


def test_a_write_that_fails_is_told(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BUFFER_BYTES, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"), OutputFile(tmp_path / "file") as out:
            for _ in range(3 * BUFFER_BYTES // 4096):
                out.write(bytes(4096))
            out.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        OutputFile(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
