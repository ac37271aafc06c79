"""Byte ranges of torch files, read with plain reads into a caller's buffer and checked on the way.

The zip directory holds a CRC-32 of every storage. Pieces are read in about the order they lie in, so the checksum is
carried along with the copy; what nobody asked for (padding between parameters) is read only for the checksum. At
`finish` every storage that gave a byte has been proved whole.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import torch

from trainer.errors import UserError
from trainer.zero.torch_files import ByteRange, Storage

CHUNK_BYTES = 16 << 20


class ChecksumReader:
    """Use as a context manager; one thread only. Memory: one chunk. Without `checksums` only lengths are checked."""

    def __init__(self, checksums: bool = True) -> None:
        self._checksums = checksums
        self._descriptors: dict[Path, int] = {}
        self._checked: dict[
            Storage, tuple[int, int]
        ] = {}  # checked up to this byte of the file, CRC-32 so far

    def __enter__(self) -> ChecksumReader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, piece: ByteRange, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `piece` from its byte `start` on. Raises UserError on a short file."""
        offset = piece.offset + start
        self._read_exactly(piece.storage, offset, buffer)
        if not self._checksums:
            return
        checked, crc = self._checked.get(piece.storage, (piece.storage.start, 0))
        if offset > checked:
            checked, crc = self._read_to(piece.storage, checked, crc, offset)
        if offset + len(buffer) > checked:
            crc = zlib.crc32(buffer[checked - offset :], crc)
            checked = offset + len(buffer)
        self._checked[piece.storage] = (checked, crc)

    def tensor(self, piece: ByteRange, start: int, num_elements: int) -> torch.Tensor:
        """Elements [start, start + num_elements) of `piece` as a tensor of their own."""
        buffer = bytearray(num_elements * piece.dtype.itemsize)
        if not buffer:
            return torch.empty(0, dtype=piece.dtype)
        self.read(piece, start * piece.dtype.itemsize, memoryview(buffer))
        return torch.frombuffer(buffer, dtype=piece.dtype)

    def finish(self) -> None:
        """Read the rest of every storage that was touched. Raises UserError naming a corrupt file."""
        for record, (checked, crc) in self._checked.items():
            _, crc = self._read_to(record, checked, crc, record.start + record.num_bytes)
            if crc != record.crc32:
                raise UserError(
                    f"{record.path} is corrupt: {record.name} fails its checksum; restore the file"
                )
        self._checked.clear()

    def _read_to(self, record: Storage, checked: int, crc: int, end: int) -> tuple[int, int]:
        buffer = memoryview(bytearray(min(CHUNK_BYTES, end - checked)))
        while checked < end:
            part = buffer[: min(CHUNK_BYTES, end - checked)]
            self._read_exactly(record, checked, part)
            crc = zlib.crc32(part, crc)
            checked += len(part)
        return checked, crc

    def _read_exactly(self, record: Storage, offset: int, buffer: memoryview) -> None:
        if record.path not in self._descriptors:
            self._descriptors[record.path] = os.open(record.path, os.O_RDONLY)
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptors[record.path], [buffer[done:]], offset + done)
            if count == 0:
                raise UserError(f"{record.path} is truncated: it ends at byte {offset + done}")
            done += count
