"""Sequential file writer that computes the SHA-256 digest and syncs the file to disk.

The writer bypasses the page cache (O_DIRECT) if the file system allows it. The cache is useless: the bytes must be on disk
before the export is published, and are not read soon. Allocating cache pages takes most of the CPU time of a write: writing
498 MB takes 0.1 to 0.9 CPU seconds with the cache and 0.03 without it (Linux 6, ext4, NVMe, virtual machine).
"""

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

BUFFER_BYTES = 16 << 20  # O_DIRECT requires a multiple of the block size
_BUFFERS = 3  # one buffer is filled while two are hashed and written


class OutputFile(contextlib.AbstractContextManager["OutputFile"]):
    """Context manager for writing one file. One thread computes the digest, and another thread writes the bytes.

    Call `write`, or fill `free_buffer()` and call `advance`, as often as needed. Then call `finish`.
    """

    def __init__(self, path: Path):
        self._file = _open_new(path)
        self._buffers = [memoryview(mmap.mmap(-1, BUFFER_BYTES)) for _ in range(_BUFFERS)]
        self._busy: list[list[Future[None]]] = [[] for _ in self._buffers]
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._digest = hashlib.sha256()
        self._offset = self._filled = 0  # file offset of the current buffer, number of bytes in the buffer

    def __exit__(self, *_: Any) -> None:
        for pool in (self._hasher, self._writer):
            pool.shutdown(cancel_futures=True)
        os.close(self._file)

    def free_buffer(self) -> memoryview:
        """Return a buffer (at least one byte long) that the caller fills. Raises OSError if an earlier write failed."""
        if not self._filled:
            for future in self._busy[self._buffer_index]:
                future.result()
        return self._buffers[self._buffer_index][self._filled :]

    def advance(self, num_bytes: int) -> None:
        """Append the first `num_bytes` of `free_buffer()` to the file."""
        self._filled += num_bytes
        if self._filled == BUFFER_BYTES:
            self._submit_buffer()

    def write(self, data: bytes | memoryview) -> None:
        remaining = memoryview(data)
        while remaining:
            buffer = self.free_buffer()[: len(remaining)]
            buffer[:] = remaining[: len(buffer)]
            self.advance(len(buffer))
            remaining = remaining[len(buffer) :]

    def finish(self) -> str:
        """Wait until all bytes are on disk; return the SHA-256 of the file. Raises OSError if a write failed."""
        self._submit_buffer()
        for future in (future for futures in self._busy for future in futures):
            future.result()
        os.fsync(self._file)
        return self._digest.hexdigest()

    @property
    def _buffer_index(self) -> int:
        return self._offset // BUFFER_BYTES % _BUFFERS

    def _submit_buffer(self) -> None:
        full = self._buffers[self._buffer_index][: self._filled]
        self._busy[self._buffer_index] = [
            self._hasher.submit(self._digest.update, full),
            self._writer.submit(_write, self._file, full, self._offset),
        ]
        self._offset, self._filled = self._offset + self._filled, 0


def _open_new(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    path.unlink(missing_ok=True)  # Linux creates the file before it rejects O_DIRECT
    return os.open(path, flags, 0o644)


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        try:
            written = os.pwrite(file, data, offset)
        except OSError as error:
            flags = fcntl.fcntl(file, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            # O_DIRECT writes whole blocks only; write the rest of the file without O_DIRECT.
            fcntl.fcntl(file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            continue
        data, offset = data[written:], offset + written
