"""safetensors files written by copying byte ranges: everything is placed before the first byte is written.

Format (github.com/huggingface/safetensors): 8 bytes little-endian length of the header, the header as JSON padded
with spaces, then the tensors' bytes without holes. Files are named and split as transformers does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.zero.checked_reader import CHUNK_BYTES, CheckedReader
from trainer.zero.stored_tensors import StoredTensor
from trainer.zero.torch_files import Piece

INDEX_NAME = "model.safetensors.index.json"
_FLUSH_EVERY_BYTES = 64 << 20
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of an output file; floating-point ones are written in `dtype`, others as they are."""

    name: str
    source: StoredTensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.source.num_elements * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One output file: `header` is its first bytes, the entries' data follow in order."""

    name: str
    entries: tuple[Entry, ...]
    header: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(entry.num_bytes for entry in self.entries)


def plan(tensors: dict[str, StoredTensor], dtype: torch.dtype, max_shard_bytes: int) -> list[Shard]:
    """Place tensors, in the order given, into files of at most `max_shard_bytes` (a larger tensor stands alone)."""
    entries = [
        Entry(name, source, dtype if source.dtype.is_floating_point else source.dtype)
        for name, source in tensors.items()
    ]
    filled: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if filled[-1] and size + entry.num_bytes > max_shard_bytes:
            filled.append([])
            size = 0
        filled[-1].append(entry)
        size += entry.num_bytes
    total = len(filled)
    shards = []
    for number, group in enumerate(filled, start=1):
        # Wide types first, so that every tensor starts at a multiple of its item size.
        ordered = tuple(sorted(group, key=lambda entry: -entry.dtype.itemsize))
        name = "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        shards.append(Shard(name, ordered, _header(ordered)))
    return shards


def _header(entries: tuple[Entry, ...]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.source.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_text(shards: list[Shard], num_parameters: int) -> str:
    """model.safetensors.index.json: which file holds which tensor."""
    total = sum(entry.num_bytes for shard in shards for entry in shard.entries)
    index = {
        "metadata": {"total_parameters": num_parameters, "total_size": total},
        "weight_map": {entry.name: shard.name for shard in shards for entry in shard.entries},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def write(shard: Shard, path: Path, reader: CheckedReader, advance: Callable[[int], None]) -> dict[str, Any]:
    """Write one file through two buffers of 16 MiB; returns {"bytes", "sha256"}, the file being on disk by then.

    One thread reads and writes, one proves what was read and digests what is written, one pushes finished pages to disk,
    so that the flush at the end has little left to do. `advance` is told of every written byte.
    """
    digest = hashlib.sha256(shard.header)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:

        def prove(piece: Piece, start: int, stored: memoryview, written: memoryview) -> None:
            reader.check(piece, start, stored)
            digest.update(written)

        with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as flusher:
            _write_all(file, memoryview(shard.header))
            buffers, hashing = [_Buffer(), _Buffer()], [Future[None](), Future[None]()]
            for future in hashing:
                future.set_result(None)
            flushing = flusher.submit(os.fdatasync, file)
            number = unflushed = 0
            for entry in shard.entries:
                for piece in entry.source.pieces:
                    step = CHUNK_BYTES // max(piece.dtype.itemsize, entry.dtype.itemsize)
                    for start in range(0, piece.num_elements, step):
                        turn = number % 2
                        hashing[turn].result()  # the buffer is free again
                        count = min(step, piece.num_elements - start)
                        stored, out = buffers[turn].fill(reader, piece, start, count, entry.dtype)
                        hashing[turn] = hasher.submit(prove, piece, start * piece.dtype.itemsize, stored, out)
                        _write_all(file, out)
                        advance(len(out))
                        number, unflushed = number + 1, unflushed + len(out)
                        if unflushed >= _FLUSH_EVERY_BYTES and flushing.done():
                            flushing.result()
                            flushing, unflushed = flusher.submit(os.fdatasync, file), 0
            for future in (*hashing, flushing):
                future.result()
        os.fsync(file)
    finally:
        os.close(file)
    return {"bytes": shard.num_bytes, "sha256": digest.hexdigest()}


class _Buffer:
    """One chunk as it is stored and, if the dtype changes, as it is written."""

    def __init__(self) -> None:
        self._stored, self._written = bytearray(CHUNK_BYTES), bytearray(0)

    def fill(
        self, reader: CheckedReader, piece: Piece, start: int, count: int, dtype: torch.dtype
    ) -> tuple[memoryview, memoryview]:
        """Elements [start, start + count) of `piece`: their bytes as stored, and in `dtype` (to nearest, ties to even)."""
        stored = memoryview(self._stored)[: count * piece.dtype.itemsize]
        reader.read(piece, start * piece.dtype.itemsize, stored)
        if piece.dtype == dtype:
            return stored, stored
        if not self._written:
            self._written = bytearray(CHUNK_BYTES)
        written = memoryview(self._written)[: count * dtype.itemsize]
        torch.frombuffer(written, dtype=dtype).copy_(torch.frombuffer(stored, dtype=piece.dtype))
        return stored, written


def _write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]
