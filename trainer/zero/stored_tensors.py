"""What a checkpoint holds, by name: the common shape of the four ZeRO stages."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from trainer.zero.torch_files import Piece


@dataclass(frozen=True)
class StoredTensor:
    """A parameter or buffer: `shape`, and the pieces whose elements, one after the other, are it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def part(self, start: int, num_elements: int) -> tuple[Piece, ...]:
        """Return the pieces that hold elements [start, start + num_elements). Raises UserError if there are fewer."""
        found = []
        for piece in self.pieces:
            if start >= piece.num_elements:
                start -= piece.num_elements
                continue
            count = min(num_elements, piece.num_elements - start)
            found.append(piece.part(start, count))
            start, num_elements = 0, num_elements - count
            if not num_elements:
                return tuple(found)
        last = self.pieces[-1]
        return (
            *found,
            last.part(last.num_elements, num_elements),
        )  # nothing, or an error if elements are left

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype


@dataclass
class StoredModel:
    """All tensors of a checkpoint in the order they lie in, and the other names of tied ones."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # a name that is not stored -> the stored one

    def find(self, name: str) -> StoredTensor | None:
        return self.tensors.get(name) or self.tensors.get(self.aliases.get(name, ""))
