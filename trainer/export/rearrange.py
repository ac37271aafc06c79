"""Tensors of an export: lists of byte ranges of checkpoint tensors, or tensors that are rearranged in memory.

A tensor that is renamed, split, stacked or concatenated by rows is a list of byte ranges. The ranges are copied in chunks,
so memory stays bounded. Most mixture-of-experts models need only these operations. A transposed or permuted tensor has only
short contiguous runs of elements, so it is rearranged in memory.
"""

import itertools
import math
from dataclasses import dataclass

import torch

from trainer.models.saved_layout import Concatenation, StridedView, coalesce_dimensions
from trainer.zero.checksum_reader import ChecksumReader
from trainer.zero.torch_files import ByteRange, TensorReference

_MIN_RUN_ELEMENTS = 1024  # reading one more byte range takes about as long as copying this many elements

_Run = tuple[str, int, int]  # name of a parameter, first element, number of elements


@dataclass(frozen=True)
class RearrangedTensor:
    """Tensor of an export that is a strided view of checkpoint tensors. `stored`: (name, reference) of each checkpoint tensor."""

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
        """Byte ranges of all elements of the checkpoint tensors, in the order of `stored`."""
        return tuple(byte_range for _, tensor in self.stored for byte_range in tensor.ranges)

    def read(self, reader: ChecksumReader) -> torch.Tensor:
        """Return the view as a contiguous tensor of the stored dtype. Raises UserError if a file ends early."""
        return _read(self.view, dict(self.stored), reader).contiguous()


def build_tensor(view: StridedView, stored: dict[str, TensorReference]) -> TensorReference | RearrangedTensor:
    """Return a TensorReference if `view` consists of long contiguous runs of elements, else a RearrangedTensor."""
    runs = _runs(view)
    if runs is None:
        return RearrangedTensor(view, tuple((name, stored[name]) for name in sorted(view.names)))
    ranges = [byte_range for name, start, count in runs for byte_range in stored[name].slice(start, count)]
    return TensorReference(view.shape, tuple(ranges))


def _runs(view: StridedView) -> list[_Run] | None:
    """Return the runs of contiguous elements of `view` in row-major order; None if the runs are too short."""
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
    return None if joined is None else [part for start in starts for part in _slice_runs(joined, start, run)]


def _joined_runs(joined: Concatenation) -> list[_Run] | None:
    num_rows = math.prod(joined.views[0].shape[: joined.dim])
    counts = [math.prod(view.shape[joined.dim :]) for view in joined.views]
    if num_rows > 1 and min(counts) < _MIN_RUN_ELEMENTS:
        return None
    parts = []
    for view, count in zip(joined.views, counts, strict=True):
        runs = _runs(view)
        if runs is None:
            return None
        parts.append([_slice_runs(runs, row * count, count) for row in range(num_rows)])
    return [run for row in zip(*parts, strict=True) for runs in row for run in runs]


def _slice_runs(runs: list[_Run], start: int, num_elements: int) -> list[_Run]:
    """Return the runs that hold elements [start, start + num_elements) of the concatenation of `runs`."""
    parts = []
    for name, first, count in runs:
        if start < count and num_elements:
            length = min(count - start, num_elements)
            parts.append((name, first + start, length))
            start, num_elements = 0, num_elements - length
        else:
            start -= min(start, count)
    return parts


def _read(view: StridedView, stored: dict[str, TensorReference], reader: ChecksumReader) -> torch.Tensor:
    if isinstance(view.source, str):
        reach = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
        ranges = stored[view.source].slice(view.offset, reach + 1 if math.prod(view.shape) else 0)
        flat = torch.cat([reader.tensor(byte_range, 0, byte_range.num_elements) for byte_range in ranges])
        return flat.as_strided(view.shape, view.strides, 0)
    joined = torch.cat([_read(part, stored, reader) for part in view.source.views], view.source.dim)
    return joined.flatten().as_strided(view.shape, view.strides, view.offset)
