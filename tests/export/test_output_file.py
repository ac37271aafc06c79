"""Files of all sizes are written correctly on all file systems."""

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
    """Folder on a disk, and on a file system that may not support O_DIRECT."""
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
    """Write with `write`, then through `free_buffer` in chunks of at most 3 MB; return the digest."""
    with OutputFile(path) as out:
        out.write(content[:1000])
        remaining = memoryview(content)[1000:]
        while remaining:
            buffer = out.free_buffer()
            count = min(len(buffer), len(remaining), 3_000_000)
            buffer[:count] = remaining[:count]
            out.advance(count)
            remaining = remaining[count:]
        return out.finish()


@pytest.mark.parametrize("size", SIZES)
def test_content_and_digest(folder: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    digest = write(folder / "file", content)
    assert (folder / "file").read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()


def test_blocks_larger_than_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel then rejects writes with O_DIRECT."""
    real, rejected = os.pwrite, []

    def rejecting(file: int, data: memoryview, offset: int) -> int:
        if not rejected:
            rejected.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, data, offset)

    monkeypatch.setattr(output_file.os, "pwrite", rejecting)
    content = np.random.default_rng(0).bytes(2 * BUFFER_BYTES + 5)
    digest = write(tmp_path / "file", content)
    assert rejected and (tmp_path / "file").read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()


def test_failed_write_raises(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BUFFER_BYTES, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"), OutputFile(tmp_path / "file") as out:
            for _ in range(3 * BUFFER_BYTES // 4096):
                out.write(bytes(4096))
            out.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        OutputFile(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
