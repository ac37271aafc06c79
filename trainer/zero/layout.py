"""A DeepSpeed 0.19 checkpoint -> every parameter as byte ranges of the ranks' files.

Sources, read in DeepSpeed 0.19.8: `runtime/engine.py` (_save_checkpoint, _save_zero_checkpoint), `runtime/zero/
stage_1_and_2.py`, `runtime/zero/stage3.py`, `runtime/bf16_optimizer.py`, `runtime/fp16/*_optimizer.py`.

stage 0     mp_rank_00_model_states.pt: `module` is the model. In bf16 the fp32 masters are in `optimizer`, without
            names (rounding.py finds them).
stage 1, 2  each rank's *_optim_states.pt holds its part of each group's flat fp32 parameters; `param_shapes` gives
            their order and `param_alignment_paddings` the gaps. Frozen parameters and buffers are in `module`, in
            training precision, beside a copy of all others, which serves to check the layout on samples. (The map
            from names to elements that DeepSpeed saves, `param_slice_mappings`, and `safe_get_full_fp32_param`,
            which uses it, are wrong when `round_robin_gradients` is on.)
stage 3     each rank's *_optim_states.pt holds ceil(n / ranks) elements of every parameter of n elements, in the
            order of `param_shapes`, in flat sub-groups; the last rank's share ends in padding. Frozen parameters are
            split the same way in each rank's model states, buffers are whole in every one.
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
from trainer.zero.tensor_references import CheckpointTensors, TensorReference
from trainer.zero.torch_files import ByteRange, TorchFile

Flat = Callable[[TorchFile, int], torch.Tensor]  # (a rank's file, number of the group) -> its flat tensor


def file_names(zero_stage: int, world_size: int, dtype: str) -> tuple[list[str], list[str]]:
    """Names of the model states and the optimizer states that DeepSpeed writes, each in rank order."""
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
    """A checkpoint's files, described but not read; each list in rank order."""

    zero_stage: int
    model: list[TorchFile]
    optimizer: list[TorchFile]  # stage 0: none


def open_files(directory: Path, zero_stage: int, world_size: int, dtype: str) -> CheckpointFiles:
    """Describe the files in `directory`.

    Raises UserError if a rank's file is missing or left over, damaged, or made by another number of ranks.
    """
    model_names, optimizer_names = file_names(zero_stage, world_size, dtype)
    _check_names(directory, zero_stage, world_size, model_names + optimizer_names)
    model_files = [TorchFile(directory / name) for name in model_names]
    for file in model_files:
        _check_world_size(file, file.content.get("dp_world_size"), world_size)
    optimizer_files = [TorchFile(directory / name) for name in optimizer_names]
    for file in optimizer_files:
        _check_world_size(file, optimizer(file).get("partition_count"), world_size)
    return CheckpointFiles(zero_stage, model_files, optimizer_files)


def read_tensors(directory: Path, zero_stage: int, world_size: int, dtype: str) -> CheckpointTensors:
    """All weights of the checkpoint in `directory`; reads metadata and samples. Raises UserError as `open_files`."""
    return weights(open_files(directory, zero_stage, world_size, dtype))


def weights(files: CheckpointFiles) -> CheckpointTensors:
    """fp32 masters of trained parameters, frozen parameters and buffers in training precision."""
    if files.zero_stage == 0:
        return _weights_stage_0(files.model[0])
    if files.zero_stage == 3:
        return _weights_stage_3(files)
    return _weights_stage_1_or_2(files)


def trained_weights(files: CheckpointFiles, flat: Flat) -> dict[str, TensorReference]:
    """Stages 1 to 3: one flat tensor per rank and group -> the part of each trained parameter, by name."""
    return _cut_shares(files, flat) if files.zero_stage == 3 else _cut_partitions(files, flat)


def _check_names(directory: Path, zero_stage: int, world_size: int, expected: list[str]) -> None:
    made_by = f"ZeRO stage {zero_stage} on {world_size} rank{'s' if world_size > 1 else ''}"
    for name in expected:
        if not (directory / name).is_file():
            raise UserError(
                f"{directory / name} is missing; the manifest says {made_by}, which writes this file"
            )
    for path in sorted(directory.glob("*_states.pt")):
        if path.name not in expected:
            raise UserError(
                f"{path} does not belong to a checkpoint of {made_by}, which the manifest says this is"
            )


def _check_world_size(file: TorchFile, found: Any, world_size: int) -> None:
    counts = found if isinstance(found, list) else [found]
    if any(count != world_size for count in counts):
        raise UserError(f"{file.path} was written by {found} ranks, but the manifest says {world_size}")


def optimizer(file: TorchFile) -> dict[str, Any]:
    """The optimizer state of a rank's file of stage 1 to 3."""
    return require(file, file.content, "optimizer_state_dict")


def require(file: TorchFile, holder: dict[str, Any], key: str) -> Any:
    """`holder[key]`. Raises UserError if `file` has nothing there."""
    if holder.get(key) is None:
        version = file.content.get("ds_version", "unknown")
        raise UserError(
            f"{file.path} has no {key!r}; it was written by DeepSpeed {version}, 0.19 is expected"
        )
    return holder[key]


def _whole(file: TorchFile, tensor: torch.Tensor) -> TensorReference:
    return TensorReference(tuple(tensor.shape), (file.byte_range(tensor),))


def _weights_stage_0(file: TorchFile) -> CheckpointTensors:
    stored = CheckpointTensors()
    first_names: dict[ByteRange, str] = {}
    for name, tensor in require(file, file.content, "module").items():
        whole = _whole(file, tensor)
        first = first_names.setdefault(whole.ranges[0], name)
        if first == name or whole.num_elements == 0:
            stored.tensors[name] = whole
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


def _weights_stage_1_or_2(files: CheckpointFiles) -> CheckpointTensors:
    (file,) = files.model
    found = trained_weights(
        files, lambda file, group: require(file, optimizer(file), "single_partition_of_fp32_groups")[group]
    )
    stored = CheckpointTensors(dict(found), aliases=dict(require(file, file.content, "shared_params")))
    module = require(file, file.content, "module")
    for name, tensor in module.items():
        if name not in found and name not in stored.aliases:  # a buffer, or a frozen parameter
            stored.tensors[name] = _whole(file, tensor)
    check_samples(
        file.path, {name: (tensor, file.byte_range(module[name])) for name, tensor in found.items()}
    )
    return stored


def _cut_partitions(files: CheckpointFiles, flat: Flat) -> dict[str, TensorReference]:
    (file,) = files.model
    paddings = optimizer(files.optimizer[0]).get("param_alignment_paddings")
    found = {}
    for index, shapes in enumerate(require(file, file.content, "param_shapes")):
        cursor = _Cursor(file.path.parent, [rank.byte_range(flat(rank, index)) for rank in files.optimizer])
        for number, (name, shape) in enumerate(shapes.items()):
            found[name] = TensorReference(tuple(shape), cursor.take(math.prod(shape)))
            cursor.take(paddings[index][number] if paddings else 0)
        cursor.expect_end(2 * len(files.optimizer))  # what is saved with padding ends at twice the ranks
    return found


def _weights_stage_3(files: CheckpointFiles) -> CheckpointTensors:
    first, model_files = files.model[0], files.model
    if "ds_zero_partition_groups" in optimizer(files.optimizer[0]):
        raise UserError(
            f"{files.optimizer[0].path} holds expert-parallel partitions, which are not supported"
        )
    found = trained_weights(
        files, lambda file, group: require(file, optimizer(file), "fp32_flat_groups")[group]
    )
    stored = CheckpointTensors(found, aliases=dict(require(first, first.content, "shared_params")))
    for name, shape in (first.content.get("frozen_param_shapes") or {}).items():
        fragments = [
            file.byte_range(require(file, file.content, "frozen_param_fragments")[name])
            for file in model_files
        ]
        stored.tensors[name] = _join(tuple(shape), [(fragment,) for fragment in fragments])
    module = require(first, first.content, "module")
    for name in require(first, first.content, "buffer_names"):
        stored.tensors[name] = _whole(first, module[name])
    return stored


def _cut_shares(files: CheckpointFiles, flat: Flat) -> dict[str, TensorReference]:
    first = files.model[0]
    shapes = {
        name: tuple(shape)
        for group in require(first, first.content, "param_shapes")
        for name, shape in group.items()
    }
    cursors = []
    for file in files.optimizer:
        num_groups = len(require(file, optimizer(file), "fp32_flat_groups"))
        cursors.append(
            _Cursor(file.path, [file.byte_range(flat(file, group)) for group in range(num_groups)])
        )
    found = {}
    for name, shape in shapes.items():
        share = -(-math.prod(shape) // len(cursors))
        found[name] = _join(shape, [cursor.take(share) for cursor in cursors])
    for cursor in cursors:
        cursor.expect_end()
    return found


def _join(shape: tuple[int, ...], shares: list[tuple[ByteRange, ...]]) -> TensorReference:
    """Concatenate the ranks' shares and cut the padding off the end."""
    left = math.prod(shape)
    pieces: list[ByteRange] = []
    for piece in (piece for share in shares for piece in share):
        kept = piece.slice(0, min(left, piece.num_elements))
        left -= kept.num_elements
        if kept.num_elements or not pieces:
            pieces.append(kept)
    if left:
        raise UserError(
            f"{shares[0][0].storage.path.parent}: {left} elements of a tensor of shape {shape} are missing"
        )
    return TensorReference(shape, tuple(pieces))


class _Cursor:
    """Takes runs of elements from a rank's flat sub-groups, one after the other."""

    def __init__(self, path: Path, groups: list[ByteRange]):
        self._path, self._groups, self._start = path, list(groups), 0
        self._nothing = groups[0].slice(0, 0)

    def take(self, num_elements: int) -> tuple[ByteRange, ...]:
        taken = []
        while num_elements:
            if not self._groups:
                raise UserError(
                    f"{self._path} holds fewer elements than the model has parameters; fp32 weights that were "
                    "offloaded to NVMe are not in it: train with offload to the CPU instead"
                )
            group = self._groups[0]
            count = min(num_elements, group.num_elements - self._start)
            if count:
                taken.append(group.slice(self._start, count))
            self._start += count
            num_elements -= count
            if self._start == group.num_elements:
                self._groups.pop(0)
                self._start = 0
        return tuple(taken) or (self._nothing,)

    def expect_end(self, padding: int = 0) -> None:
        """Fail if more than `padding` elements are left."""
        if sum(group.num_elements for group in self._groups) - self._start > padding:
            raise UserError(f"{self._path} holds more elements than the model has parameters")
