"""Comparison of fp32 master weights with the model's weights in the same checkpoint, which are the masters rounded.

It names masters that were saved without names, and checks on samples that a layout was read correctly.

Without names: in ZeRO stage 0 in bf16 DeepSpeed's FP16 optimizers save masters as `fp32_groups`, lists of tensors, or
`fp32_groups_flat`, one flat tensor a group, in the order of the optimizer's groups. Within a group the parameters keep
the order of the model; so each parameter is the next one of the group whose elements round to it, bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.errors import UserError
from trainer.zero.checksum_reader import CHUNK_BYTES, ChecksumReader
from trainer.zero.torch_files import ByteRange, TensorReference

_SAMPLE_ELEMENTS = 256


def match_master_weights(
    path: Path, low_precision: dict[str, TensorReference], groups: list[list[ByteRange]]
) -> dict[str, TensorReference]:
    """Return the masters in `groups` by parameter name, without parameters that have none (frozen ones).

    `low_precision`: the model's parameters in model order. Reads both once. Raises UserError if a master is left over,
    which is the case if any was matched wrongly.
    """
    found: dict[str, TensorReference] = {}
    positions = [(0, 0)] * len(groups)  # per group: (next tensor, its next element)
    with ChecksumReader() as reader:
        for name, low in low_precision.items():
            for index, group in enumerate(groups):
                number, start = positions[index]
                if number == len(group) or start + low.num_elements > group[number].num_elements:
                    continue
                master = group[number].slice(start, low.num_elements)
                if _rounds_to(reader, master, low.ranges[0]):
                    found[name] = TensorReference(low.shape, (master,))
                    end = start + low.num_elements
                    positions[index] = (number, end) if end < group[number].num_elements else (number + 1, 0)
                    break
        reader.verify_checksums()
    if any(number < len(group) for (number, _), group in zip(positions, groups, strict=True)):
        raise UserError(
            f"{path}: the optimizer's fp32 weights do not round to the model's weights, so their parameters cannot be "
            "identified; was the checkpoint saved in the middle of a step?"
        )
    return found


def check_samples(path: Path, pairs: dict[str, tuple[TensorReference, ByteRange]]) -> None:
    """Compare the first and last elements of each range of a master with the model's copy of the parameter.

    `pairs`: name -> (master, copy). Raises UserError naming a parameter that differs, because the layout is unknown.
    """
    with ChecksumReader(checksums=False) as reader:
        for name, (master, low) in pairs.items():
            if low.num_elements != master.num_elements:
                raise UserError(
                    f"{path}: {name} has {low.num_elements} elements, its fp32 weights {master.num_elements}"
                )
            start = 0
            for byte_range in master.ranges:
                count = min(_SAMPLE_ELEMENTS, byte_range.num_elements)
                for offset in {0, byte_range.num_elements - count}:
                    sample = byte_range.slice(offset, count)
                    if not _rounds_to(reader, sample, low.slice(start + offset, count)):
                        _check_storages(byte_range, low)
                        raise UserError(
                            f"{path}: the fp32 weights that should be {name} do not round to it; the checkpoint is "
                            "mixed from two, or of a DeepSpeed version with another layout"
                        )
                start += byte_range.num_elements


def _check_storages(*ranges: ByteRange) -> None:
    """Raise UserError naming the file if the storage of a range is corrupt."""
    with ChecksumReader() as reader:
        for byte_range in ranges:
            reader.tensor(byte_range, 0, 1)
        reader.verify_checksums()


def _rounds_to(reader: ChecksumReader, master: ByteRange, low: ByteRange) -> bool:
    step = CHUNK_BYTES // master.dtype.itemsize
    for start in range(0, low.num_elements, step):
        count = min(step, low.num_elements - start)
        rounded = reader.tensor(master, start, count).to(low.dtype)
        if not torch.equal(rounded.view(torch.uint8), reader.tensor(low, start, count).view(torch.uint8)):
            return False
    return True
