"""Write safetensors files by copying byte ranges; the layout is planned before the first byte is written.

Format (github.com/huggingface/safetensors): 8 bytes little-endian length of the header, the header as JSON padded
with spaces, then the tensors' bytes without holes. Files are named and split as transformers does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.export.output_file import OutputFile
from trainer.export.rearrange import RearrangedTensor
from trainer.zero.checksum_reader import ChecksumReader
from trainer.zero.torch_files import ByteRange, TensorReference

INDEX_NAME = "model.safetensors.index.json"
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of an output file, written in `dtype`."""

    name: str
    source: TensorReference | RearrangedTensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.source.num_elements * self.dtype.itemsize


@dataclass(frozen=True)
class OutputShard:
    """One output file: the header, then the bytes of the tensors in order."""

    name: str
    tensors: tuple[OutputTensor, ...]
    header: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(entry.num_bytes for entry in self.tensors)


def plan_shards(
    tensors: Mapping[str, TensorReference | RearrangedTensor],
    dtype: torch.dtype,
    max_shard_bytes: int,
    kept_dtypes: dict[str, torch.dtype] | None = None,
) -> list[OutputShard]:
    """Return files of at most `max_shard_bytes`, tensors in the given order; a larger tensor has a file of its own.

    Floating-point tensors are written in `dtype`, or in that of `kept_dtypes` by name; others in their stored dtype.
    """
    kept_dtypes = kept_dtypes or {}
    entries = [
        OutputTensor(
            name, source, kept_dtypes.get(name, dtype) if source.dtype.is_floating_point else source.dtype
        )
        for name, source in tensors.items()
    ]
    groups: list[list[OutputTensor]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.num_bytes
    total = len(groups)
    shards = []
    for number, group in enumerate(groups, start=1):
        # Wide types first, so that every tensor starts at a multiple of its item size.
        ordered = tuple(sorted(group, key=lambda entry: -entry.dtype.itemsize))
        name = "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        shards.append(OutputShard(name, ordered, _header(ordered)))
    return shards


def _header(entries: tuple[OutputTensor, ...]) -> bytes:
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


def index_text(shards: list[OutputShard], num_parameters: int) -> str:
    """Return model.safetensors.index.json, which maps tensors to files."""
    total = sum(entry.num_bytes for shard in shards for entry in shard.tensors)
    index = {
        "metadata": {"total_parameters": num_parameters, "total_size": total},
        "weight_map": {entry.name: shard.name for shard in shards for entry in shard.tensors},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def write(
    shard: OutputShard, path: Path, reader: ChecksumReader, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Write one file to disk and return {"bytes", "sha256"}. `advance` receives the number of newly written bytes.

    Memory: a few chunks of 16 MiB, and for a RearrangedTensor twice the span of elements that it reads.
    """
    with OutputFile(path) as out:
        out.write(shard.header)
        for entry in shard.tensors:
            if isinstance(entry.source, RearrangedTensor):
                tensor = entry.source.read(reader).to(entry.dtype).flatten()
                out.write(memoryview(tensor.view(torch.uint8).numpy()))  # type: ignore[arg-type]
                advance(entry.num_bytes)
            else:
                _write_ranges(out, entry.source, entry.dtype, reader, advance)
        return {"bytes": shard.num_bytes, "sha256": out.finish()}


def _write_ranges(
    out: OutputFile,
    source: TensorReference,
    dtype: torch.dtype,
    reader: ChecksumReader,
    advance: Callable[[int], None],
) -> None:
    for byte_range in source.ranges:
        start = 0
        while start < byte_range.num_elements:
            # A tensor starts at a multiple of its item size, so an element never crosses buffers.
            buffer = out.free_buffer()
            count = min(len(buffer) // dtype.itemsize, byte_range.num_elements - start)
            buffer = buffer[: count * dtype.itemsize]
            _fill(buffer, dtype, reader, byte_range, start, count)
            out.advance(len(buffer))
            advance(len(buffer))
            start += count


def _fill(
    out: memoryview, dtype: torch.dtype, reader: ChecksumReader, byte_range: ByteRange, start: int, count: int
) -> None:
    """Read elements [start, start + count) of `byte_range` into `out` as `dtype` (rounded to nearest, ties to even)."""
    if byte_range.dtype == dtype:
        reader.read(byte_range, start * byte_range.dtype.itemsize, out)
    else:
        torch.frombuffer(out, dtype=dtype).copy_(reader.tensor(byte_range, start, count))
