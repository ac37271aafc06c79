"""The model's own weights, saved beside the fp32 masters, are exactly the masters rounded: a proof of who is who.

It gives names to masters that have none, and shows on samples that a layout was read right.

ZeRO stage 0 in bf16 or fp16: DeepSpeed's FP16 optimizers (used for bf16 too) save masters as `fp32_groups`, lists of
tensors, or `fp32_groups_flat`, one flat tensor a group, in the order of the optimizer's groups, without a name. Within
a group the parameters keep the order of the model; so, walking through the model, each parameter is the next one of
that group whose elements round to it, bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.errors import UserError
from trainer.zero.checksum_reader import CHUNK_BYTES, ChecksumReader
from trainer.zero.tensor_references import TensorReference
from trainer.zero.torch_files import ByteRange

_SAMPLE_ELEMENTS = 256


def match_master_weights(
    path: Path, low_precision: dict[str, TensorReference], groups: list[list[ByteRange]]
) -> dict[str, TensorReference]:
    """Give names to the masters in `groups`. A parameter without a master (a frozen one) is left out.

    `low_precision`: the model's parameters in model order. Reads both once. Raises UserError if a master is left
    over, so that a wrong guess cannot pass.
    """
    found: dict[str, TensorReference] = {}
    positions = [(0, 0)] * len(groups)  # the next tensor of the group, and how far into it
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
        reader.finish()
    if any(number < len(group) for (number, _), group in zip(positions, groups, strict=True)):
        raise UserError(
            f"{path}: the optimizer's fp32 weights do not round to the model's weights, so they cannot be told "
            "apart; was the checkpoint saved in the middle of a step?"
        )
    return found


def check_samples(path: Path, pairs: dict[str, tuple[TensorReference, ByteRange]]) -> None:
    """Compare the first and the last elements of each piece of a master with the model's own copy of it.

    Raises UserError naming a parameter that does not agree: then the layout is not the one known here.
    """
    with ChecksumReader(checksums=False) as reader:
        for name, (master, low) in pairs.items():
            if low.num_elements != master.num_elements:
                raise UserError(
                    f"{path}: {name} has {low.num_elements} elements, its fp32 weights {master.num_elements}"
                )
            start = 0
            for piece in master.ranges:
                count = min(_SAMPLE_ELEMENTS, piece.num_elements)
                for offset in {0, piece.num_elements - count}:
                    if not _rounds_to(reader, piece.slice(offset, count), low.slice(start + offset, count)):
                        _prove_whole(piece, low)
                        raise UserError(
                            f"{path}: the fp32 weights that should be {name} do not round to it; the checkpoint is "
                            "mixed from two, or of a DeepSpeed version that lays them out in another way"
                        )
                start += piece.num_elements


def _prove_whole(*pieces: ByteRange) -> None:
    """Raise UserError naming the file if one of these lies in a corrupt storage."""
    with ChecksumReader() as reader:
        for piece in pieces:
            reader.tensor(piece, 0, 1)
        reader.finish()


def _rounds_to(reader: ChecksumReader, master: ByteRange, low: ByteRange) -> bool:
    step = CHUNK_BYTES // master.dtype.itemsize
    for start in range(0, low.num_elements, step):
        count = min(step, low.num_elements - start)
        rounded = reader.tensor(master, start, count).to(low.dtype)
        if not torch.equal(rounded.view(torch.uint8), reader.tensor(low, start, count).view(torch.uint8)):
            return False
    return True
