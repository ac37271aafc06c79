"""Tensors of an export as byte ranges of checkpoint tensors, or rearranged in memory.

Renamed, split, stacked and row-wise concatenated tensors (all mixtures of experts) are byte ranges, so memory stays
bounded. Transposed and permuted ones consist of runs of a few elements; they are read whole and rearranged in memory.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from trainer.models.saved_layout import Concatenation, StridedView, coalesce_dimensions
from trainer.zero.checksum_reader import ChecksumReader
from trainer.zero.torch_files import ByteRange, TensorReference

_MIN_RUN_ELEMENTS = 1024  # a byte range takes about as much time as copying this many elements

_Run = tuple[str, int, int]  # name of the model's tensor, first element, number of elements


@dataclass(frozen=True)
class RearrangedTensor:
    """A strided view of checkpoint tensors that is read whole and rearranged in memory."""

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
        """Byte ranges of the elements, unordered."""
        return tuple(piece for _, tensor in self.stored for piece in tensor.ranges)

    def read(self, reader: ChecksumReader) -> torch.Tensor:
        """Return the elements as a contiguous tensor of the stored dtype. Raises UserError for a corrupt file."""
        return _read(self.view, dict(self.stored), reader).contiguous()


def build_tensor(view: StridedView, stored: dict[str, TensorReference]) -> TensorReference | RearrangedTensor:
    """Return a TensorReference if the elements of `view` are long runs of the checkpoint, else a RearrangedTensor.

    stored: the checkpoint's tensors by name.
    """
    runs = _runs(view)
    if runs is None:
        return RearrangedTensor(view, tuple((name, stored[name]) for name in sorted(view.names)))
    pieces = [piece for name, start, count in runs for piece in stored[name].slice(start, count)]
    return TensorReference(view.shape, tuple(pieces))


def _runs(view: StridedView) -> list[_Run] | None:
    """Return the contiguous runs of elements of `view` in row-major order; None if they are shorter than the minimum."""
    sizes, strides = coalesce_dimensions(view.shape, view.strides)
    run = 1
    if strides and strides[-1] == 1:
        run, sizes, strides = sizes[-1], sizes[:-1], strides[:-1]
    if sizes and run < _MIN_RUN_ELEMENTS:
        return None
    steps = [range(0, size * stride, stride) for size, stride in zip(sizes, strides, strict=True)]
    starts = [view.offset + sum(index) for index in itertools.product(*steps)]
    if math.prod(view.shape) == 0:
        run, starts = 0, [0]
    if isinstance(view.source, str):
        return [(view.source, start, run) for start in starts]
    joined = _joined_runs(view.source)
    return (
        None if joined is None else [piece for start in starts for piece in _slice_runs(joined, start, run)]
    )


def _joined_runs(joined: Concatenation) -> list[_Run] | None:
    runs_of_views = [_runs(view) for view in joined.views]
    num_rows = math.prod(joined.views[0].shape[: joined.dim])
    counts = [math.prod(view.shape[joined.dim :]) for view in joined.views]
    if num_rows > 1 and min(counts) < _MIN_RUN_ELEMENTS:
        return None
    found: list[_Run] = []
    for row in range(num_rows):
        for runs, count in zip(runs_of_views, counts, strict=True):
            if runs is None:
                return None
            found += _slice_runs(runs, row * count, count)
    return found


def _slice_runs(runs: list[_Run], start: int, num_elements: int) -> list[_Run]:
    """Return the runs of elements [start, start + num_elements) of the concatenation of `runs`."""
    found = []
    for name, first, count in runs:
        if start < count and num_elements:
            length = min(count - start, num_elements)
            found.append((name, first + start, length))
            start, num_elements = 0, num_elements - length
        else:
            start -= min(start, count)
    return found


def _read(view: StridedView, stored: dict[str, TensorReference], reader: ChecksumReader) -> torch.Tensor:
    if isinstance(view.source, str):
        reach = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
        pieces = stored[view.source].slice(view.offset, reach + 1 if math.prod(view.shape) else 0)
        flat = torch.cat([reader.tensor(piece, 0, piece.num_elements) for piece in pieces])
        return flat.as_strided(view.shape, view.strides, 0)
    joined = torch.cat([_read(part, stored, reader) for part in view.source.views], view.source.dim)
    return joined.flatten().as_strided(view.shape, view.strides, view.offset)
