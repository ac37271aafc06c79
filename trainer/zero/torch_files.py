"""Locate the tensors in `torch.save` files as byte ranges, without reading the tensors.

A torch file is a zip archive of uncompressed entries: `data.pkl` describes the objects, `data/<n>` is the n-th
storage. So a tensor is a byte range of the file, and the zip directory holds a CRC-32 of every storage.
`torch.load(map_location="meta")` reads `data.pkl` but no storage, and records the offset of each storage.

Files cannot run code, because `weights_only=True` builds only plain containers, tensors and allowed classes. DeepSpeed's
files refer to three classes of DeepSpeed. `_STAND_INS` replaces these classes, so that DeepSpeed is not imported.
"""

import bisect
import math
import operator
import pickle
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from trainer.errors import UserError, first_line
from trainer.runtime import library_internals


class _Empty:
    pass


_STAND_INS: list[Any] = [
    (_Empty, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Empty, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
_header_offset = operator.attrgetter("header_offset")


@dataclass(frozen=True)
class Storage:
    """A storage of a torch file: bytes [start, start + num_bytes) of the file, and the CRC-32 from the zip directory."""

    path: Path
    name: str
    start: int
    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class ByteRange:
    """Consecutive elements of a storage. `offset`: position of the first element in the file, in bytes."""

    storage: Storage
    offset: int
    num_elements: int
    dtype: torch.dtype

    def slice(self, start: int, num_elements: int) -> Self:
        """Return elements [start, start + num_elements) of this range. Raises UserError if the range has fewer elements."""
        if start < 0 or num_elements < 0 or start + num_elements > self.num_elements:
            raise UserError(
                f"{self.storage.path}: elements {start} to {start + num_elements} are expected in a tensor of "
                f"{self.num_elements}; the file and its description disagree"
            )
        return replace(self, offset=self.offset + start * self.dtype.itemsize, num_elements=num_elements)


@dataclass(frozen=True)
class TensorReference:
    """Reference to a parameter or buffer. `ranges`: the byte ranges that hold the elements, in order."""

    shape: tuple[int, ...]
    ranges: tuple[ByteRange, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def slice(self, start: int, num_elements: int) -> tuple[ByteRange, ...]:
        """Return the byte ranges of elements [start, start + num_elements). Raises UserError if the tensor is shorter."""
        slices = []
        for byte_range in self.ranges:
            if start >= byte_range.num_elements:
                start -= byte_range.num_elements
                continue
            count = min(num_elements, byte_range.num_elements - start)
            slices.append(byte_range.slice(start, count))
            start, num_elements = 0, num_elements - count
            if not num_elements:
                return tuple(slices)
        last = self.ranges[-1]
        return (*slices, last.slice(last.num_elements, num_elements))  # raises if the tensor is too short

    @property
    def dtype(self) -> torch.dtype:
        return self.ranges[0].dtype


@dataclass
class CheckpointTensors:
    """All tensors of a checkpoint by name, and the other names (aliases) of tied tensors."""

    tensors: dict[str, TensorReference] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # alias -> name in `tensors`

    def find(self, name: str) -> TensorReference | None:
        """Return the tensor that has `name` as its name or alias; None if there is no such tensor."""
        return self.tensors.get(name) or self.tensors.get(self.aliases.get(name, ""))


class TorchFile:
    """A torch file, opened without reading the data of the tensors. `content`: the saved dict, with meta tensors.

    The constructor raises UserError if the file is missing or damaged, has no dict, or refers to a forbidden class.
    """

    def __init__(self, path: Path):
        self.path = path
        self._entries = self._zip_entries()
        self.content: dict[str, Any] = load(path, "meta")
        if not isinstance(self.content, dict):
            raise UserError(f"{path} holds a {type(self.content).__name__}; expected a DeepSpeed state dict")

    def byte_range(self, tensor: torch.Tensor) -> ByteRange:
        """Return the byte range of a tensor of `content`. Raises UserError if the tensor is not contiguous."""
        if not tensor.is_contiguous():
            raise UserError(
                f"{self.path} holds a tensor of shape {tuple(tensor.shape)} that is not contiguous"
            )
        untyped = tensor.untyped_storage()
        start, num_bytes = library_internals.offset_in_file(untyped), untyped.nbytes()
        entry = self._entries[bisect.bisect_right(self._entries, start, key=_header_offset) - 1]
        if entry.file_size != num_bytes or entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self.path}: the zip entry {entry.filename} is not the expected storage")
        storage = Storage(self.path, entry.filename, start, num_bytes, entry.CRC)
        whole = ByteRange(storage, start, num_bytes // tensor.dtype.itemsize, tensor.dtype)
        return whole.slice(int(tensor.storage_offset()), math.prod(tensor.shape))

    def _zip_entries(self) -> list[zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                description = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                archive.read(description)  # raises BadZipFile if the CRC-32 is wrong
                return sorted(archive.infolist(), key=_header_offset)
        except FileNotFoundError:
            raise UserError(f"{self.path} is missing") from None
        # zipfile raises NotImplementedError if damaged bytes look like an unknown compression method or version.
        except (zipfile.BadZipFile, StopIteration, EOFError, OSError, NotImplementedError) as error:
            detail = str(error) or "no data.pkl inside"
            raise UserError(f"{self.path} is corrupt or not a torch file ({detail})") from None


def load(path: Path, device: str, mmap: bool = False) -> Any:
    """Load a torch file to `device`. Raises UserError if the file is damaged or refers to a forbidden class.

    All classes except tensors, plain containers and the classes in `_STAND_INS` are forbidden.
    """
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it asks for {_unsafe_names(path) or first_line(error)}, which no DeepSpeed checkpoint "
            "needs. No code of the file was run. Do not unpickle this file with another program"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None


def _unsafe_names(path: Path) -> str:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    except Exception:  # a malicious pickle may break torch's analysis; `load` refuses the file in any case
        return ""
