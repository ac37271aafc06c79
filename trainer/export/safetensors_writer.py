"""Write safetensors files by copying byte ranges; the layout is planned before the first byte is written.

Format (github.com/huggingface/safetensors): the length of the header (8 bytes, little-endian), the header (JSON padded with
spaces), then the tensors' bytes without gaps. File names are as in the `save_pretrained` method of transformers.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.export.output_file import OutputFile
from trainer.export.rearrange import RearrangedTensor
from trainer.storage.manifest import FileDigest
from trainer.zero.checksum_reader import ChecksumReader
from trainer.zero.torch_files import TensorReference

INDEX_NAME = "model.safetensors.index.json"
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class OutputTensor:
    """Tensor of an output file, written in `dtype`."""

    name: str
    source: TensorReference | RearrangedTensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.source.num_elements * self.dtype.itemsize


@dataclass(frozen=True)
class OutputShard:
    """Output file: `header` (length and JSON), then the bytes of the tensors in order."""

    name: str
    tensors: tuple[OutputTensor, ...]
    header: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(entry.num_bytes for entry in self.tensors)


def split_into_shards(
    tensors: Mapping[str, TensorReference | RearrangedTensor],
    dtype: torch.dtype,
    max_shard_bytes: int,
    kept_dtypes: dict[str, torch.dtype],
) -> list[OutputShard]:
    """Return output files with at most `max_shard_bytes` of tensors each, filled in order. A larger tensor has its own file.

    Floating-point tensors are converted to `dtype`, or to `kept_dtypes[name]` if it exists. Other tensors keep their dtype.
    """
    groups: list[list[OutputTensor]] = [[]]
    size = 0
    for name, source in tensors.items():
        is_float = source.dtype.is_floating_point
        entry = OutputTensor(name, source, kept_dtypes.get(name, dtype) if is_float else source.dtype)
        if groups[-1] and size + entry.num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.num_bytes
    shards = []
    for number, group in enumerate(groups, start=1):
        # Tensors of wide types come first, so that every tensor starts at a multiple of its item size.
        ordered = tuple(sorted(group, key=lambda entry: -entry.dtype.itemsize))
        suffix = "" if len(groups) == 1 else f"-{number:05d}-of-{len(groups):05d}"
        shards.append(OutputShard(f"model{suffix}.safetensors", ordered, _header(ordered)))
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
    """Return the text of model.safetensors.index.json, which maps tensor names to file names."""
    total = sum(entry.num_bytes for shard in shards for entry in shard.tensors)
    index = {
        "metadata": {"total_parameters": num_parameters, "total_size": total},
        "weight_map": {entry.name: shard.name for shard in shards for entry in shard.tensors},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def write(
    shard: OutputShard, path: Path, reader: ChecksumReader, advance: Callable[[int], None]
) -> FileDigest:
    """Write one file to disk and return its size and digest. `advance` receives the number of bytes of each written part.

    Memory: a few chunks of 16 MiB, and for a RearrangedTensor twice the bytes that are read for it.
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
            # Every tensor starts at a multiple of its item size, so no element crosses a buffer boundary.
            buffer = out.free_buffer()
            count = min(len(buffer) // dtype.itemsize, byte_range.num_elements - start)
            buffer = buffer[: count * dtype.itemsize]
            if byte_range.dtype == dtype:
                reader.read(byte_range, start * dtype.itemsize, buffer)
            else:  # `copy_` rounds to nearest, ties to even
                torch.frombuffer(buffer, dtype=dtype).copy_(reader.tensor(byte_range, start, count))
            out.advance(len(buffer))
            advance(len(buffer))
            start += count
