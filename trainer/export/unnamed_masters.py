"""ZeRO stage 0 in bf16 or fp16: fp32 masters without names, found by what they round to.

DeepSpeed's FP16 optimizers (it uses them for bf16 too) save masters as `fp32_groups`, lists of tensors, or
`fp32_groups_flat`, one flat tensor a group, in the order of the optimizer's groups, and nothing says which parameter
is which. But the model's own weights, saved beside them, are exactly the masters rounded. Within a group the
parameters keep the order of the model; so walking through the model, each parameter is the next one of that group
whose elements round to it, bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.errors import UserError
from trainer.export.checked_reader import CHUNK_BYTES, CheckedReader
from trainer.export.stored_tensors import StoredTensor
from trainer.export.torch_files import Piece


def name_masters(
    path: Path, low_precision: dict[str, StoredTensor], groups: list[list[Piece]]
) -> dict[str, StoredTensor]:
    """Give names to the masters in `groups`. A parameter without a master (a frozen one) is left out.

    `low_precision`: the model's parameters in model order. Reads both once. Raises UserError if a master is left
    over, so that a wrong guess cannot pass.
    """
    found: dict[str, StoredTensor] = {}
    positions = [(0, 0)] * len(groups)  # the next tensor of the group, and how far into it
    with CheckedReader() as reader:
        for name, low in low_precision.items():
            for index, group in enumerate(groups):
                number, start = positions[index]
                if number == len(group) or start + low.num_elements > group[number].num_elements:
                    continue
                master = group[number].part(start, low.num_elements)
                if _rounds_to(reader, master, low.pieces[0]):
                    found[name] = StoredTensor(low.shape, (master,))
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


def _rounds_to(reader: CheckedReader, master: Piece, low: Piece) -> bool:
    step = CHUNK_BYTES // master.dtype.itemsize
    for start in range(0, low.num_elements, step):
        count = min(step, low.num_elements - start)
        rounded = reader.tensor(master, start, count).to(low.dtype).view(torch.int16)
        if not torch.equal(rounded, reader.tensor(low, start, count).view(torch.int16)):
            return False
    return True
