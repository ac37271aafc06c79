"""Locations of every parameter of a DeepSpeed 0.19 checkpoint as byte ranges of the ranks' files.

Sources, read in DeepSpeed 0.19.8: `runtime/engine.py` (_save_checkpoint, _save_zero_checkpoint), `runtime/zero/
stage_1_and_2.py`, `runtime/zero/stage3.py`, `runtime/bf16_optimizer.py`, `runtime/fp16/*_optimizer.py`.

stage 0     mp_rank_00_model_states.pt: `module` is the model. In bf16 the fp32 masters are in `optimizer`, without
            names (`match_master_weights` finds them).
stage 1, 2  each rank's *_optim_states.pt holds its partition of each group's flat fp32 parameters; `param_shapes`
            gives their order and `param_alignment_paddings` the gaps. `module` holds all parameters and buffers in
            training precision: frozen parameters and buffers are read from there, samples of the others check the
            layout. (DeepSpeed's map from names to elements, `param_slice_mappings`, and `safe_get_full_fp32_param`,
            which uses it, are wrong when `round_robin_gradients` is on.)
stage 3     each rank's *_optim_states.pt holds ceil(n / ranks) elements of every parameter of n elements, in the
            order of `param_shapes`, in flat sub-groups; the last rank's shard ends in padding. Frozen parameters are
            sharded the same way in each rank's model states, buffers are whole in every one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.zero.master_weights import check_samples, match_master_weights
from trainer.zero.torch_files import ByteRange, CheckpointTensors, TensorReference, TorchFile

# (a rank's file, index of a group) -> the group's flat tensor
FlatTensor = Callable[[TorchFile, int], torch.Tensor]


def file_names(zero_stage: int, world_size: int, dtype: str) -> tuple[list[str], list[str]]:
    """Return the file names of DeepSpeed's model states and optimizer states, each in rank order."""
    ranks = range(world_size)
    if zero_stage == 3:
        model = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in ranks]
    else:
        model = ["mp_rank_00_model_states.pt"]
    prefix = "bf16_" if dtype == "bf16" else ""
    optimizer = [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in ranks]
    return model, optimizer if zero_stage else []


@dataclass(frozen=True)
class CheckpointFiles:
    """The opened files of a checkpoint, without their tensors; each list is in rank order."""

    zero_stage: int
    model: list[TorchFile]
    optimizer: list[TorchFile]  # empty in stage 0


def open_files(directory: Path, zero_stage: int, world_size: int, dtype: str) -> CheckpointFiles:
    """Return the checkpoint's files with their metadata.

    Raises UserError if a rank's file is missing, unexpected, damaged, or written by another number of ranks.
    """
    model_names, optimizer_names = file_names(zero_stage, world_size, dtype)
    _check_names(directory, zero_stage, world_size, model_names + optimizer_names)
    model_files = [TorchFile(directory / name) for name in model_names]
    for file in model_files:
        _check_world_size(file, file.content.get("dp_world_size"), world_size)
    optimizer_files = [TorchFile(directory / name) for name in optimizer_names]
    for file in optimizer_files:
        _check_world_size(file, optimizer_states(file).get("partition_count"), world_size)
    return CheckpointFiles(zero_stage, model_files, optimizer_files)


def read_tensors(directory: Path, zero_stage: int, world_size: int, dtype: str) -> CheckpointTensors:
    """Return all weights of a checkpoint; reads metadata and samples. Raises UserError, see `open_files`."""
    return locate_weights(open_files(directory, zero_stage, world_size, dtype))


def locate_weights(files: CheckpointFiles) -> CheckpointTensors:
    """Return fp32 masters of trained parameters, frozen parameters and buffers in training precision."""
    first = files.model[0]
    if files.zero_stage == 0:
        return _weights_stage_0(first)
    if "ds_zero_partition_groups" in optimizer_states(files.optimizer[0]):
        raise UserError(
            f"{files.optimizer[0].path} holds expert-parallel partitions, which are not supported"
        )
    key = "fp32_flat_groups" if files.zero_stage == 3 else "single_partition_of_fp32_groups"
    found = split_flat_tensors(files, lambda file, group: require(file, optimizer_states(file), key)[group])
    stored = CheckpointTensors(dict(found), aliases=dict(require(first, first.content, "shared_params")))
    module = require(first, first.content, "module")
    if files.zero_stage == 3:
        for name, shape in (first.content.get("frozen_param_shapes") or {}).items():
            stored.tensors[name] = _join(
                tuple(shape),
                [
                    file.byte_range(require(file, file.content, "frozen_param_fragments")[name])
                    for file in files.model
                ],
            )
        for name in require(first, first.content, "buffer_names"):
            stored.tensors[name] = whole(first, module[name])
        return stored
    for name, tensor in module.items():
        if name not in found and name not in stored.aliases:  # a buffer, or a frozen parameter
            stored.tensors[name] = whole(first, tensor)
    check_samples(
        first.path, {name: (tensor, first.byte_range(module[name])) for name, tensor in found.items()}
    )
    return stored


def split_flat_tensors(files: CheckpointFiles, flat: FlatTensor) -> dict[str, TensorReference]:
    """Return the range of each trained parameter, by name, in the flat tensors of all ranks (stages 1 to 3)."""
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
            raise UserError(
                f"{path} does not belong to a checkpoint of {setting}, which the manifest says this is"
            )


def _check_world_size(file: TorchFile, found: Any, world_size: int) -> None:
    counts = found if isinstance(found, list) else [found]
    if any(count != world_size for count in counts):
        raise UserError(f"{file.path} was written by {found} ranks, but the manifest says {world_size}")


def optimizer_states(file: TorchFile) -> dict[str, Any]:
    """Return the optimizer states in a rank's file of stage 1 to 3."""
    states: dict[str, Any] = require(file, file.content, "optimizer_state_dict")
    return states


def require(file: TorchFile, content: dict[str, Any], key: str) -> Any:
    """Return `content[key]`, where `content` is (part of) that of `file`. Raises UserError if it is missing or None."""
    if content.get(key) is None:
        version = file.content.get("ds_version", "unknown")
        raise UserError(
            f"{file.path} has no {key!r}; it was written by DeepSpeed {version}, 0.19 is expected"
        )
    return content[key]


def whole(file: TorchFile, tensor: torch.Tensor) -> TensorReference:
    """Return the reference to a tensor that is stored in one piece."""
    return TensorReference(tuple(tensor.shape), (file.byte_range(tensor),))


def _weights_stage_0(file: TorchFile) -> CheckpointTensors:
    stored = CheckpointTensors()
    first_names: dict[ByteRange, str] = {}
    for name, tensor in require(file, file.content, "module").items():
        found = whole(file, tensor)
        first = first_names.setdefault(found.ranges[0], name)
        if first == name or found.num_elements == 0:
            stored.tensors[name] = found
        else:
            stored.aliases[name] = first
    optimizer = file.content.get("optimizer") or {}
    groups = optimizer.get("fp32_groups") or optimizer.get("fp32_groups_flat")
    if groups:  # trained in bf16 or fp16
        masters = [
            [file.byte_range(tensor) for tensor in (group if isinstance(group, list) else [group])]
            for group in groups
        ]
        buffers = set(require(file, file.content, "buffer_names"))
        trained = {name: tensor for name, tensor in stored.tensors.items() if name not in buffers}
        stored.tensors.update(match_master_weights(file.path, trained, masters))
    return stored


def _split_stage_1_or_2(files: CheckpointFiles, flat: FlatTensor) -> dict[str, TensorReference]:
    (file,) = files.model
    paddings = optimizer_states(files.optimizer[0]).get("param_alignment_paddings")
    found = {}
    for index, shapes in enumerate(require(file, file.content, "param_shapes")):
        cursor = _Cursor(file.path.parent, [rank.byte_range(flat(rank, index)) for rank in files.optimizer])
        for number, (name, shape) in enumerate(shapes.items()):
            found[name] = TensorReference(tuple(shape), cursor.take(math.prod(shape)))
            cursor.take(paddings[index][number] if paddings else 0)
        cursor.expect_end(2 * len(files.optimizer))  # saved padding aligns to twice the number of ranks
    return found


def _split_stage_3(files: CheckpointFiles, flat: FlatTensor) -> dict[str, TensorReference]:
    first = files.model[0]
    shapes = {
        name: tuple(shape)
        for group in require(first, first.content, "param_shapes")
        for name, shape in group.items()
    }
    cursors = []
    for file in files.optimizer:
        num_groups = len(require(file, optimizer_states(file), "fp32_flat_groups"))
        cursors.append(
            _Cursor(file.path, [file.byte_range(flat(file, group)) for group in range(num_groups)])
        )
    found = {}
    for name, shape in shapes.items():
        shard_size = -(-math.prod(shape) // len(cursors))
        found[name] = _join(shape, [part for cursor in cursors for part in cursor.take(shard_size)])
    for cursor in cursors:
        cursor.expect_end()
    return found


def _join(shape: tuple[int, ...], shards: list[ByteRange]) -> TensorReference:
    """Concatenate the ranks' shards without the padding at the end."""
    joined = TensorReference(shape, tuple(shards))
    return TensorReference(shape, joined.slice(0, joined.num_elements))


class _Cursor:
    """Position in the concatenated flat groups of a rank."""

    def __init__(self, path: Path, groups: list[ByteRange]):
        num_elements = sum(group.num_elements for group in groups)
        self._path, self._flat, self._start = path, TensorReference((num_elements,), tuple(groups)), 0

    def take(self, num_elements: int) -> tuple[ByteRange, ...]:
        """Return the ranges of the next elements. Raises UserError if there are fewer."""
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
