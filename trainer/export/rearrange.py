"""Tensors of the files, put together from tensors of a checkpoint as byte ranges, or in memory where runs are too short.

Renamed, split, stacked and row-wise concatenated tensors (all Mixtures of Experts) are byte ranges, so memory stays
bounded. Transposed and permuted ones consist of runs of a few elements; they are read whole and rearranged in memory.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from trainer.models.saved_layout import Joined, StridedView, merged
from trainer.zero.checksum_reader import ChecksumReader
from trainer.zero.tensor_references import TensorReference
from trainer.zero.torch_files import ByteRange

_MIN_RUN_ELEMENTS = 1024  # a byte range costs about as much time as copying this many elements

_Run = tuple[str, int, int]  # name of the model's tensor, first element, number of elements


@dataclass(frozen=True)
class RearrangedTensor:
    """A tensor that is read whole: what `view` reads of the tensors in `stored`."""

    view: StridedView
    stored: tuple[tuple[str, TensorReference], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    @property
    def num_elements(self) -> int:
        return math.prod(self.view.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.stored[0][1].dtype

    @property
    def ranges(self) -> tuple[ByteRange, ...]:
        """Return where the elements come from, in no order."""
        return tuple(piece for _, tensor in self.stored for piece in tensor.ranges)

    def read(self, reader: ChecksumReader) -> torch.Tensor:
        """Return the elements as a contiguous tensor of the stored dtype. Raises UserError for a damaged file."""
        return _read(self.view, dict(self.stored), reader).contiguous()


def build(view: StridedView, stored: dict[str, TensorReference]) -> TensorReference | RearrangedTensor:
    """Return the tensor that `view` describes. `stored` has the tensors of the model by name."""
    runs = _runs(view)
    if runs is None:
        return RearrangedTensor(view, tuple((name, stored[name]) for name in sorted(view.names)))
    pieces = [piece for name, start, count in runs for piece in stored[name].slice(start, count)]
    return TensorReference(view.shape, tuple(pieces))


def _runs(view: StridedView) -> list[_Run] | None:
    """Return the runs of elements that `view` reads, in row-major order; None if they are too short to be copied singly."""
    sizes, strides = merged(view.shape, view.strides)
    run = 1
    if strides and strides[-1] == 1:
        run, sizes, strides = sizes[-1], sizes[:-1], strides[:-1]
    if sizes and run < _MIN_RUN_ELEMENTS:
        return None
    steps = [range(0, size * stride, stride) for size, stride in zip(sizes, strides, strict=True)]
    starts = [view.offset + sum(index) for index in itertools.product(*steps)]
    if math.prod(view.shape) == 0:
        run, starts = 0, [0]
    if isinstance(view.of, str):
        return [(view.of, start, run) for start in starts]
    joined = _joined_runs(view.of)
    return None if joined is None else [part for start in starts for part in _cut(joined, start, run)]


def _joined_runs(joined: Joined) -> list[_Run] | None:
    parts = [_runs(part) for part in joined.views]
    num_rows = math.prod(joined.views[0].shape[: joined.dim])
    counts = [math.prod(part.shape[joined.dim :]) for part in joined.views]
    if num_rows > 1 and min(counts) < _MIN_RUN_ELEMENTS:
        return None
    found: list[_Run] = []
    for row in range(num_rows):
        for part, count in zip(parts, counts, strict=True):
            if part is None:
                return None
            found += _cut(part, row * count, count)
    return found


def _cut(runs: list[_Run], start: int, num_elements: int) -> list[_Run]:
    """Return elements [start, start + num_elements) of what `runs` read one after the other."""
    found = []
    for name, first, count in runs:
        if start < count and num_elements:
            taken = min(count - start, num_elements)
            found.append((name, first + start, taken))
            start, num_elements = 0, num_elements - taken
        else:
            start -= min(start, count)
    return found


def _read(view: StridedView, stored: dict[str, TensorReference], reader: ChecksumReader) -> torch.Tensor:
    if isinstance(view.of, str):
        first, last = _span(view)
        pieces = stored[view.of].slice(first, last - first)
        flat = torch.cat([reader.tensor(piece, 0, piece.num_elements) for piece in pieces])
        return flat.as_strided(view.shape, view.strides, view.offset - first)
    joined = torch.cat([_read(part, stored, reader) for part in view.of.views], view.of.dim)
    return joined.flatten().as_strided(view.shape, view.strides, view.offset)


def _span(view: StridedView) -> tuple[int, int]:
    """Return the first element that `view` reads, and the one after the last."""
    if math.prod(view.shape) == 0:
        return view.offset, view.offset
    reach = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    return view.offset, view.offset + reach + 1
