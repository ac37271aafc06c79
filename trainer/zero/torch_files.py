"""Where the tensors of a `torch.save` file lie on disk, learned without reading one of them.

A torch file is a zip archive whose entries are stored uncompressed: `data.pkl` describes the objects, `data/<n>` is
the storage of tensor n. So a tensor is a byte range of the file, and the zip directory holds a CRC-32 of every
storage. `torch.load(map_location="meta")` reads the description alone and notes each storage's offset.

Nothing in a file can run code: `weights_only=True` builds plain containers and tensors, and the few classes that
DeepSpeed pickles by name are replaced by the empty stand-ins below, so that DeepSpeed is not even imported.
"""

from __future__ import annotations

import bisect
import math
import pickle
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError


class _FragmentAddress:
    pass


class _LossScaler:
    pass


class _DynamicLossScaler:
    pass


def _zero_stage(value: int) -> int:
    return int(value)


_STAND_INS: list[Any] = [
    (_FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_DynamicLossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_zero_stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


@dataclass(frozen=True)
class Storage:
    """One storage of a torch file: bytes [start, start + num_bytes), with the checksum the zip directory gives."""

    path: Path
    name: str
    start: int
    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class ByteRange:
    """A run of `num_elements` elements inside a record, beginning at the file's byte `offset`."""

    storage: Storage
    offset: int
    num_elements: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    def slice(self, start: int, num_elements: int) -> ByteRange:
        """Elements [start, start + num_elements) of this piece. Raises UserError if the piece is shorter."""
        if start < 0 or num_elements < 0 or start + num_elements > self.num_elements:
            raise UserError(
                f"{self.storage.path}: elements {start} to {start + num_elements} are wanted of a tensor of "
                f"{self.num_elements}; the file and its description disagree"
            )
        return replace(self, offset=self.offset + start * self.dtype.itemsize, num_elements=num_elements)


class TorchFile:
    """A torch file by its description: `content` is the saved object with meta tensors, `piece` finds their bytes."""

    def __init__(self, path: Path):
        """Raises UserError if the file is damaged or asks for anything beyond tensors and plain containers."""
        self.path = path
        entries = self._zip_entries()
        self._starts = [entry.header_offset for entry in entries]
        self._entries = entries
        self.content: dict[str, Any] = load(path, "meta")
        if not isinstance(self.content, dict):
            raise UserError(f"{path} holds a {type(self.content).__name__}; expected a DeepSpeed state dict")

    def byte_range(self, tensor: torch.Tensor) -> ByteRange:
        """The byte range of a contiguous tensor of `content`."""
        if not tensor.is_contiguous():
            raise UserError(
                f"{self.path} holds a tensor of shape {tuple(tensor.shape)} that is not contiguous"
            )
        storage = tensor.untyped_storage()
        start, num_bytes = int(storage._checkpoint_offset), storage.nbytes()  # type: ignore
        entry = self._entries[bisect.bisect_right(self._starts, start) - 1]
        if entry.file_size != num_bytes or entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self.path}: the zip entry {entry.filename} is not the storage it should be")
        record = Storage(self.path, entry.filename, start, num_bytes, entry.CRC)
        whole = ByteRange(record, start, num_bytes // tensor.dtype.itemsize, tensor.dtype)
        return whole.slice(int(tensor.storage_offset()), math.prod(tensor.shape))

    def _zip_entries(self) -> list[zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                description = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                archive.read(description)  # checks its CRC-32
                return sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        except FileNotFoundError:
            raise UserError(f"{self.path} is missing") from None
        # zipfile raises NotImplementedError for an unknown compression or version, which here means damaged bytes.
        except (zipfile.BadZipFile, StopIteration, EOFError, OSError, NotImplementedError) as error:
            detail = str(error) or "no data.pkl inside"
            raise UserError(f"{self.path} is corrupt or not a torch file ({detail})") from None


def load(path: Path, device: str, mmap: bool = False) -> Any:
    """`torch.load` restricted to tensors, plain containers and DeepSpeed's four inert classes."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it asks for {_unsafe_names(path) or str(error).splitlines()[0]}, which no DeepSpeed "
            "checkpoint needs. It was not run. Do not open this file with anything that unpickles it"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from None


def _unsafe_names(path: Path) -> str:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    except Exception:  # a hostile pickle may break the analysis too; the refusal stands
        return ""
