"""Reader for byte ranges of torch files. It checks the CRC-32 of every storage from which a range was read.

A torch file is a zip archive, whose directory holds a CRC-32 of every storage. Ranges are read approximately in file order,
so each read can update a running checksum of the storage. Bytes between the ranges (padding between parameters) are read for
the checksum only.
"""

import contextlib
import os
import zlib
from pathlib import Path

import torch

from trainer.errors import UserError
from trainer.zero.torch_files import ByteRange, Storage

CHUNK_BYTES = 16 << 20


class ChecksumReader(contextlib.AbstractContextManager["ChecksumReader"]):
    """Reader for byte ranges of checkpoint files. Must be used in one thread, as a context manager.

    `verify_checksums` compares the CRC-32 of each storage that was read with the value in the zip directory. If the argument
    `checksums` is False, only the lengths of the files are checked. The reader needs CHUNK_BYTES of memory.
    """

    def __init__(self, checksums: bool = True) -> None:
        self._checksums = checksums
        self._descriptors: dict[Path, int] = {}
        # storage -> (file offset of the storage's first unread byte, CRC-32 of the storage's bytes before this offset)
        self._progress: dict[Storage, tuple[int, int]] = {}

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, byte_range: ByteRange, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `byte_range` from byte `start` on. Raises UserError if the file ends early."""
        storage, offset = byte_range.storage, byte_range.offset + start
        self._read_exactly(storage, offset, buffer)
        if self._checksums:
            position, crc = self._read_to(storage, *self._progress.get(storage, (storage.start, 0)), offset)
            if offset + len(buffer) > position:
                crc = zlib.crc32(buffer[position - offset :], crc)
                position = offset + len(buffer)
            self._progress[storage] = (position, crc)

    def tensor(self, byte_range: ByteRange, start: int, num_elements: int) -> torch.Tensor:
        """Return elements [start, start + num_elements) of `byte_range` as a new tensor."""
        buffer = bytearray(num_elements * byte_range.dtype.itemsize)
        if not buffer:
            return torch.empty(0, dtype=byte_range.dtype)
        self.read(byte_range, start * byte_range.dtype.itemsize, memoryview(buffer))
        return torch.frombuffer(buffer, dtype=byte_range.dtype)

    def verify_checksums(self) -> None:
        """Complete the checksum of every storage from which a range was read. Raises UserError if a checksum is wrong."""
        for storage, (position, crc) in self._progress.items():
            _, crc = self._read_to(storage, position, crc, storage.start + storage.num_bytes)
            if crc != storage.crc32:
                raise UserError(
                    f"{storage.path} is corrupt: the checksum of {storage.name} differs; restore the file"
                )
        self._progress.clear()

    def _read_to(self, storage: Storage, position: int, crc: int, end: int) -> tuple[int, int]:
        buffer = memoryview(bytearray(max(0, min(CHUNK_BYTES, end - position))))

        while position < end:
            chunk = buffer[: min(CHUNK_BYTES, end - position)]
            self._read_exactly(storage, position, chunk)
            crc = zlib.crc32(chunk, crc)
            position += len(chunk)
        return position, crc

    def _read_exactly(self, storage: Storage, offset: int, buffer: memoryview) -> None:
        if storage.path not in self._descriptors:
            self._descriptors[storage.path] = os.open(storage.path, os.O_RDONLY)
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptors[storage.path], [buffer[done:]], offset + done)
            if count == 0:
                raise UserError(f"{storage.path} is truncated: it ends at byte {offset + done}")
            done += count
