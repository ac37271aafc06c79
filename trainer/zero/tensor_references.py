"""What a checkpoint holds, by name: the common shape of the four ZeRO stages."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from trainer.zero.torch_files import ByteRange


@dataclass(frozen=True)
class TensorReference:
    """A parameter or buffer: `shape`, and the pieces whose elements, one after the other, are it."""

    shape: tuple[int, ...]
    ranges: tuple[ByteRange, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def slice(self, start: int, num_elements: int) -> tuple[ByteRange, ...]:
        """Return the pieces that hold elements [start, start + num_elements). Raises UserError if there are fewer."""
        found = []
        for piece in self.ranges:
            if start >= piece.num_elements:
                start -= piece.num_elements
                continue
            count = min(num_elements, piece.num_elements - start)
            found.append(piece.slice(start, count))
            start, num_elements = 0, num_elements - count
            if not num_elements:
                return tuple(found)
        last = self.ranges[-1]
        return (
            *found,
            last.slice(last.num_elements, num_elements),
        )  # nothing, or an error if elements are left

    @property
    def dtype(self) -> torch.dtype:
        return self.ranges[0].dtype


@dataclass
class CheckpointTensors:
    """All tensors of a checkpoint in the order they lie in, and the other names of tied ones."""

    tensors: dict[str, TensorReference] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # a name that is not stored -> the stored one

    def find(self, name: str) -> TensorReference | None:
        return self.tensors.get(name) or self.tensors.get(self.aliases.get(name, ""))
