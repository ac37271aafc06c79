"""Check on samples that the fp32 master weights of a checkpoint round to the model's weights in the same checkpoint."""

from pathlib import Path

import torch

from trainer.errors import UserError
from trainer.zero.checksum_reader import ChecksumReader
from trainer.zero.torch_files import ByteRange, TensorReference

_SAMPLE_ELEMENTS = 256


def check_samples(path: Path, pairs: dict[str, tuple[TensorReference, ByteRange]]) -> None:
    """Check that the first and last elements of each byte range of the fp32 masters round to the model's weights.

    `pairs`: parameter name -> (fp32 master, copy in training precision). Raises UserError if a rounded master differs
    from its copy in a sample, or in the number of elements. Possible causes of a difference are a corrupt file, files of
    two checkpoints, or a new layout of DeepSpeed.
    """
    with ChecksumReader(checksums=False) as reader:
        for name, (master, low) in pairs.items():
            if low.num_elements != master.num_elements:
                counts = f"{low.num_elements} elements, its fp32 weights {master.num_elements}"
                raise UserError(f"{path}: {name} has {counts}")
            start = 0
            for byte_range in master.ranges:
                count = min(_SAMPLE_ELEMENTS, byte_range.num_elements)
                for offset in {0, byte_range.num_elements - count}:
                    sample = byte_range.slice(offset, count)
                    rounded = reader.tensor(sample, 0, count).to(low.dtype)
                    stored = reader.tensor(low.slice(start + offset, count), 0, count)
                    if not torch.equal(rounded.view(torch.uint8), stored.view(torch.uint8)):
                        _check_storages(byte_range, low)
                        raise UserError(
                            f"{path}: the fp32 weights at the position of {name} do not round to {name}; the checkpoint "
                            "is mixed from two, or from a DeepSpeed version with another layout"
                        )
                start += byte_range.num_elements


def _check_storages(*ranges: ByteRange) -> None:
    """Raise UserError if the storage that holds one of the ranges has a wrong checksum. The message names the file."""
    with ChecksumReader() as reader:
        for byte_range in ranges:
            reader.tensor(byte_range, 0, 1)
        reader.verify_checksums()
