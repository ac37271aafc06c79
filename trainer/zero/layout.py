"""Locations of every parameter of a DeepSpeed 0.19 checkpoint as byte ranges of the ranks' files.

Sources (DeepSpeed 0.19.8): `runtime/engine.py` (_save_checkpoint, _save_zero_checkpoint), `runtime/zero/
stage_1_and_2.py`, `runtime/zero/stage3.py`, `runtime/bf16_optimizer.py`.

stage 0     `module` in mp_rank_00_model_states.pt holds the model's tensors, in fp32. Stage 0 in bf16 is refused.
stage 1, 2  The *_optim_states.pt of a rank holds the rank's partition of each group's flat fp32 parameters.
            `param_shapes` gives the order of the parameters. `param_alignment_paddings` gives the number of padding
            elements after each parameter. `module` holds all parameters and buffers in training precision. Frozen
            parameters and buffers are read from `module`. Samples of the trained parameters in `module` must equal the
            rounded fp32 parameters ("masters"). (DeepSpeed's `param_slice_mappings` and `safe_get_full_fp32_param` are
            wrong if `round_robin_gradients` is on.)
stage 3     The *_optim_states.pt of a rank holds flat sub-groups. The sub-groups contain a shard of every
            trained parameter, in the order of `param_shapes`. A parameter of n elements has shards of ceil(n / ranks)
            elements. The last shards can end in padding. The model states of each rank hold a shard of every frozen
            parameter, and whole buffers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.zero.master_weights import check_samples
from trainer.zero.torch_files import ByteRange, CheckpointTensors, TensorReference, TorchFile

# function (file of a rank, index of a parameter group) -> flat tensor of this group
FlatTensor = Callable[[TorchFile, int], torch.Tensor]


def file_names(zero_stage: int, world_size: int, dtype: str) -> tuple[list[str], list[str]]:
    """Return the file names of DeepSpeed's model states and optimizer states, each in rank order."""
    ranks = [f"zero_pp_rank_{rank}_mp_rank_00" for rank in range(world_size)]
    model = [f"{rank}_model_states.pt" for rank in (ranks if zero_stage == 3 else ["mp_rank_00"])]
    prefix = "bf16_" if dtype == "bf16" else ""
    return model, [f"{prefix}{rank}_optim_states.pt" for rank in ranks] if zero_stage else []


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint. Their metadata are loaded, their tensors are not. Each list is in rank order."""

    zero_stage: int
    model: list[TorchFile]
    optimizer: list[TorchFile]  # empty in stage 0


def open_files(directory: Path, zero_stage: int, world_size: int, dtype: str) -> CheckpointFiles:
    """Return the checkpoint's files with their metadata.

    Raises UserError if a file is missing, unexpected, damaged or from another number of ranks, and for stage 0 in bf16.
    """
    if zero_stage == 0 and dtype != "fp32":
        raise UserError(
            f"{directory} was trained in {dtype} at ZeRO stage 0, where DeepSpeed updates the weights wrongly; train it "
            "again at stage 1, 2 or 3"
        )
    model_names, optimizer_names = file_names(zero_stage, world_size, dtype)
    _check_names(directory, zero_stage, world_size, model_names + optimizer_names)
    model_files = [TorchFile(directory / name) for name in model_names]
    for file in model_files:
        _check_world_size(file, file.content.get("dp_world_size"), world_size)
    optimizer_files = [TorchFile(directory / name) for name in optimizer_names]
    for file in optimizer_files:
        _check_world_size(file, optimizer_states(file).get("partition_count"), world_size)
    return CheckpointFiles(zero_stage, model_files, optimizer_files)


def locate_weights(files: CheckpointFiles) -> CheckpointTensors:
    """Return references to the fp32 masters of the trained parameters, and to all frozen parameters and buffers."""
    first = files.model[0]
    if files.zero_stage == 0:
        return _weights_stage_0(first)
    if "ds_zero_partition_groups" in optimizer_states(files.optimizer[0]):
        raise UserError(
            f"{files.optimizer[0].path} holds expert-parallel partitions, which are not supported"
        )
    key = "fp32_flat_groups" if files.zero_stage == 3 else "single_partition_of_fp32_groups"
    masters = split_flat_tensors(
        files, lambda file, group: required_value(file, optimizer_states(file), key)[group]
    )
    stored = CheckpointTensors(
        dict(masters), aliases=dict(required_value(first, first.content, "shared_params"))
    )
    module = required_value(first, first.content, "module")
    if files.zero_stage == 3:
        for name, shape in (first.content.get("frozen_param_shapes") or {}).items():
            fragments = [required_value(file, file.content, "frozen_param_fragments") for file in files.model]
            shards = [
                file.byte_range(of_rank[name]) for file, of_rank in zip(files.model, fragments, strict=True)
            ]
            stored.tensors[name] = _join(tuple(shape), shards)
        for name in required_value(first, first.content, "buffer_names"):
            stored.tensors[name] = single_range_reference(first, module[name])
        return stored
    for name, tensor in module.items():
        if name not in masters and name not in stored.aliases:  # a buffer, or a frozen parameter
            stored.tensors[name] = single_range_reference(first, tensor)
    pairs = {name: (master, first.byte_range(module[name])) for name, master in masters.items()}
    check_samples(first.path, pairs)
    return stored


def split_flat_tensors(files: CheckpointFiles, flat: FlatTensor) -> dict[str, TensorReference]:
    """Return a dict (name of a trained parameter -> its ranges in the flat tensors of all ranks), for stages 1 to 3."""
    return _split_stage_3(files, flat) if files.zero_stage == 3 else _split_stage_1_or_2(files, flat)


def _check_names(directory: Path, zero_stage: int, world_size: int, expected: list[str]) -> None:
    setting = f"ZeRO stage {zero_stage} on {world_size} rank{'s' if world_size > 1 else ''}"
    for name in expected:
        if not (directory / name).is_file():
            raise UserError(
                f"{directory / name} is missing; the manifest says {setting}, which writes this file"
            )
    for path in sorted(directory.glob("*_states.pt")):
        if path.name not in expected:
            raise UserError(f"{path} does not belong to this checkpoint: the manifest says {setting}")


def _check_world_size(file: TorchFile, counts: Any, world_size: int) -> None:
    if any(count != world_size for count in (counts if isinstance(counts, list) else [counts])):
        raise UserError(f"{file.path} was written by {counts} ranks, but the manifest says {world_size}")


def optimizer_states(file: TorchFile) -> dict[str, Any]:
    states: dict[str, Any] = required_value(file, file.content, "optimizer_state_dict")
    return states


def required_value(file: TorchFile, content: dict[str, Any], key: str) -> Any:
    """Return `content[key]`. Raises UserError if the value is missing or None. `content`: all or part of `file.content`."""
    if content.get(key) is None:
        version = file.content.get("ds_version", "unknown")
        raise UserError(f"{file.path} has no {key!r}; the file is from DeepSpeed {version}, expected is 0.19")
    return content[key]


def single_range_reference(file: TorchFile, tensor: torch.Tensor) -> TensorReference:
    """Return the reference to a tensor that is stored in one byte range."""
    return TensorReference(tuple(tensor.shape), (file.byte_range(tensor),))


def _weights_stage_0(file: TorchFile) -> CheckpointTensors:
    stored = CheckpointTensors()
    first_names: dict[ByteRange, str] = {}
    for name, tensor in required_value(file, file.content, "module").items():
        reference = single_range_reference(file, tensor)
        first = first_names.setdefault(reference.ranges[0], name)
        if first == name or reference.num_elements == 0:
            stored.tensors[name] = reference
        else:
            stored.aliases[name] = first
    return stored


def _split_stage_1_or_2(files: CheckpointFiles, flat: FlatTensor) -> dict[str, TensorReference]:
    (file,) = files.model
    paddings = optimizer_states(files.optimizer[0]).get("param_alignment_paddings")
    references = {}
    for index, shapes in enumerate(required_value(file, file.content, "param_shapes")):
        cursor = _Cursor(file.path.parent, [rank.byte_range(flat(rank, index)) for rank in files.optimizer])
        for number, (name, shape) in enumerate(shapes.items()):
            references[name] = TensorReference(tuple(shape), cursor.take(math.prod(shape)))
            cursor.take(paddings[index][number] if paddings else 0)
        cursor.expect_end(2 * len(files.optimizer))  # DeepSpeed pads to a multiple of 2 * ranks
    return references


def _split_stage_3(files: CheckpointFiles, flat: FlatTensor) -> dict[str, TensorReference]:
    first = files.model[0]
    cursors = []
    for file in files.optimizer:
        groups = range(len(required_value(file, optimizer_states(file), "fp32_flat_groups")))
        cursors.append(_Cursor(file.path, [file.byte_range(flat(file, group)) for group in groups]))
    references = {}
    for shapes in required_value(first, first.content, "param_shapes"):
        for name, shape in shapes.items():
            shard_size = -(-math.prod(shape) // len(cursors))
            shards = [byte_range for cursor in cursors for byte_range in cursor.take(shard_size)]
            references[name] = _join(tuple(shape), shards)
    for cursor in cursors:
        cursor.expect_end()
    return references


def _join(shape: tuple[int, ...], shards: list[ByteRange]) -> TensorReference:
    """Return a reference to the concatenated shards of all ranks, without the padding at the end."""
    joined = TensorReference(shape, tuple(shards))
    return TensorReference(shape, joined.slice(0, joined.num_elements))


class _Cursor:
    """Read position in the flat tensors of one group on all ranks (stages 1, 2), or of all groups on one rank (stage 3)."""

    def __init__(self, path: Path, groups: list[ByteRange]):
        num_elements = sum(group.num_elements for group in groups)
        self._path, self._flat, self._start = path, TensorReference((num_elements,), tuple(groups)), 0

    def take(self, num_elements: int) -> tuple[ByteRange, ...]:
        """Return the ranges of the next `num_elements` elements, and advance. Raises UserError if fewer are left."""
        start, self._start = self._start, self._start + num_elements
        if self._start > self._flat.num_elements:
            raise UserError(
                f"{self._path} holds fewer elements than the model has parameters; it lacks fp32 weights that were "
                "offloaded to NVMe: train with offload to the CPU instead"
            )
        return self._flat.slice(start, num_elements)

    def expect_end(self, padding: int = 0) -> None:
        """Raise UserError if more than `padding` elements are left."""
        if self._flat.num_elements - self._start > padding:
            raise UserError(f"{self._path} holds more elements than the model has parameters")
