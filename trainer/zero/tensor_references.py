"""Named tensors of a checkpoint as byte ranges, the same for all ZeRO stages."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from trainer.zero.torch_files import ByteRange


@dataclass(frozen=True)
class TensorReference:
    """A parameter or buffer: its shape, and the ranges that hold its elements in order."""

    shape: tuple[int, ...]
    ranges: tuple[ByteRange, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def slice(self, start: int, num_elements: int) -> tuple[ByteRange, ...]:
        """Return the ranges of elements [start, start + num_elements). Raises UserError if there are fewer."""
        found = []
        for byte_range in self.ranges:
            if start >= byte_range.num_elements:
                start -= byte_range.num_elements
                continue
            count = min(num_elements, byte_range.num_elements - start)
            found.append(byte_range.slice(start, count))
            start, num_elements = 0, num_elements - count
            if not num_elements:
                return tuple(found)
        last = self.ranges[-1]
        return (*found, last.slice(last.num_elements, num_elements))  # raises UserError if elements are left

    @property
    def dtype(self) -> torch.dtype:
        return self.ranges[0].dtype


@dataclass
class CheckpointTensors:
    """All tensors of a checkpoint in file order, and the aliases of tied ones."""

    tensors: dict[str, TensorReference] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # alias -> name in `tensors`

    def find(self, name: str) -> TensorReference | None:
        return self.tensors.get(name) or self.tensors.get(self.aliases.get(name, ""))
