"""Loading of a checkpoint of any world size and ZeRO stage: each rank reads the byte ranges it needs.

DeepSpeed loads only checkpoints of the same number of ranks and the same stage (its universal checkpoints are an
offline conversion), and every rank unpickles whole files. Here a parameter's fp32 master and moments are byte ranges of
the old ranks' files (trainer/zero), copied into the partitions of the new engine (partitions.py). A run resumed on the
same ranks and stage takes the same path.

Memory: at most one chunk of 16 MiB beside the engine. The digests of the files must have been checked (checkpoint.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.runtime import distributed, library_internals
from trainer.training.partitions import Partition, local_shard, optimizer_state, partitions
from trainer.zero.checksum_reader import CHUNK_BYTES, ChecksumReader
from trainer.zero.optimizer_state import MOMENTS, PARAMETER_NAMES, OptimizerState, read_optimizer_state
from trainer.zero.torch_files import ByteRange, TensorReference


@torch.no_grad()
def load(engine: Any, path: Path, zero_stage: int, world_size: int, dtype: str) -> None:
    """Load masters, moments, step, frozen parameters, buffers and working weights into `engine`. Collective.

    `zero_stage`, `world_size`, `dtype`: from the manifest of the checkpoint. Raises UserError if the checkpoint is of
    another model; parts of it may then have been loaded.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()  # stage 3 releases its gathered parameters
    with distributed.errors_on_all_ranks():
        stored = read_optimizer_state(path, zero_stage, world_size, dtype)
        _check_shapes(engine, stored, path)
        with ChecksumReader(checksums=False) as reader:
            for partition in partitions(engine):
                _load_partition(engine, partition, stored, reader, path)
            _load_untrained(engine, stored, reader, path)
    _update_working_weights(optimizer)
    engine.global_steps = stored.step
    engine.global_samples = stored.step * engine.train_batch_size()


def saved_names(engine: Any) -> dict[str, list[str]]:
    """Return what a checkpoint of stage 0 holds besides DeepSpeed's files: the optimizer's parameter names, in order."""
    if engine.zero_optimization():
        return {}
    return {PARAMETER_NAMES: [one.name for partition in partitions(engine) for one in partition.slices]}


def _load_partition(
    engine: Any, partition: Partition, stored: OptimizerState, reader: ChecksumReader, path: Path
) -> None:
    state = optimizer_state(engine, partition.master, stored.step)
    for one in partition.slices:
        elements = slice(one.offset, one.offset + one.count)
        master = partition.master.data.view(-1)[elements]
        _copy(reader, path, one.name, stored.weights.find(one.name), one.start, master)
        for key in MOMENTS:
            moment, name = state[key].view(-1)[elements], f"{key} of {one.name}"
            _copy(reader, path, name, stored.moment(key, one.name), one.start, moment)


def _load_untrained(engine: Any, stored: OptimizerState, reader: ChecksumReader, path: Path) -> None:
    """Load frozen parameters and persistent buffers, which are stored in training precision."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        weight = stored.weights.find(name)
        if hasattr(parameter, "ds_tensor"):
            start, count = local_shard(parameter)
            _copy(reader, path, name, weight, start, parameter.ds_tensor.data.view(-1)[:count])
        else:
            _copy(reader, path, name, weight, 0, parameter.data.view(-1))
    for name, buffer in engine.module.named_buffers():
        if name in stored.weights.tensors:
            _copy(reader, path, name, stored.weights.tensors[name], 0, buffer.view(-1))


def _copy(
    reader: ChecksumReader,
    path: Path,
    name: str,
    stored: TensorReference | None,
    start: int,
    target: torch.Tensor,
) -> None:
    """Copy elements [start, start + len(target)) of a stored tensor into `target` [elements] of the same dtype."""
    if stored is None:
        raise UserError(f"{path} has no {name}, which this model trains; it is a checkpoint of another model")
    if stored.dtype != target.dtype:
        raise UserError(f"{path} holds {name} as {stored.dtype}, this run keeps it as {target.dtype}")
    if len(target) and start + len(target) > stored.num_elements:
        raise UserError(
            f"{path}: {name} has {stored.num_elements} elements, this model's has more; it is a checkpoint of another model"
        )
    done = 0
    for byte_range in stored.slice(start, len(target)):
        for begin in range(0, byte_range.num_elements, CHUNK_BYTES // target.element_size()):
            chunk = target[done:][
                : min(CHUNK_BYTES // target.element_size(), byte_range.num_elements - begin)
            ]
            _read_into(reader, byte_range, begin, chunk)
            done += len(chunk)


def _read_into(reader: ChecksumReader, byte_range: ByteRange, start: int, target: torch.Tensor) -> None:
    """Read elements from `start` on into `target`, without a copy if it is on the CPU."""
    if target.device.type == "cpu":
        buffer: Any = target.detach().view(torch.uint8).numpy()
        reader.read(byte_range, start * byte_range.dtype.itemsize, memoryview(buffer))
    else:
        target.copy_(reader.tensor(byte_range, start, len(target)))


def _check_shapes(engine: Any, stored: OptimizerState, path: Path) -> None:
    """Raise UserError if the checkpoint has a tensor that the model lacks, or has in another shape."""
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    shapes |= {name: tuple(buffer.shape) for name, buffer in engine.module.named_buffers()}
    tied = {primary for alias, primary in stored.weights.aliases.items() if alias in shapes}
    for name, tensor in stored.weights.tensors.items():
        if name not in shapes and name not in tied:
            raise UserError(f"{path} holds {name}, which this model does not have")
        if name in shapes and tensor.shape != shapes[name]:
            raise UserError(f"{path}: {name} has shape {tensor.shape}, this model's has {shapes[name]}")


def _update_working_weights(optimizer: Any) -> None:
    """Compute the working weights of every rank from the masters, as DeepSpeed does after a step. Collective."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for sub_group in range(len(optimizer.fp16_groups)):
            library_internals.update_weights_of_sub_group(optimizer, sub_group)
        optimizer.checkpoint_event_epilogue()  # gathers the small parameters that are not sharded
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
