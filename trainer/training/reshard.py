"""Go on from a checkpoint of any world size and ZeRO stage: each rank reads the byte ranges it needs, nothing else.

DeepSpeed loads only what the same number of ranks saved in the same stage (its universal checkpoints are an offline
conversion), and every rank unpickles whole files. Here a parameter's fp32 master and moments are byte ranges of the old
ranks' files (trainer/zero) and are copied to where the new layout keeps them (partitions.py). There is one path: a run
that goes on in its old layout takes it as well, so every test of a resumed run tests it.

Memory: at most one chunk of 16 MiB beside the engine. The bytes must have been proved before (checkpoint.py digests the files).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.runtime import distributed
from trainer.training.partitions import Partition, local_shard, optimizer_state, partitions, set_step
from trainer.zero.checksum_reader import CHUNK_BYTES, ChecksumReader
from trainer.zero.optimizer_state import MOMENTS, NAMES, OptimizerState, read_optimizer_state
from trainer.zero.tensor_references import TensorReference
from trainer.zero.torch_files import ByteRange


@torch.no_grad()
def load(engine: Any, path: Path, zero_stage: int, world_size: int, dtype: str) -> None:
    """Masters, moments, step, frozen parameters, buffers and working weights of `engine` from a checkpoint. Collective.

    `zero_stage`, `world_size`, `dtype`: of the checkpoint, as its manifest says. Raises UserError if the checkpoint is
    not of this model; it may then have been loaded in part.
    """
    optimizer, error = engine.optimizer, None
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()  # stage 3 lets go of what it has gathered
    try:
        stored = read_optimizer_state(path, zero_stage, world_size, dtype)
        _check_nothing_left(engine, stored, path)
        with ChecksumReader(checksums=False) as reader:
            for partition in partitions(engine):
                _fill(engine, partition, stored, reader, path)
            _fill_untrained(engine, stored, reader, path)
    except (UserError, OSError) as problem:
        error = str(problem)
    distributed.raise_on_all_ranks(error)
    _spread(optimizer)
    engine.global_steps = stored.step
    engine.global_samples = stored.step * engine.train_batch_size()


def saved_names(engine: Any) -> dict[str, list[str]]:
    """What a checkpoint of stage 0 needs beside the optimizer's state: its parameters' names, in its order."""
    if engine.zero_optimization():
        return {}
    return {NAMES: [span.name for partition in partitions(engine) for span in partition.slices]}


def _fill(
    engine: Any, partition: Partition, stored: OptimizerState, reader: ChecksumReader, path: Path
) -> None:
    state = optimizer_state(engine, partition.master)
    set_step(state, stored.step)
    master = partition.master.data.view(-1)
    moments = {which: state[which].view(-1) for which in MOMENTS}
    for span in partition.slices:
        place = slice(span.offset, span.offset + span.count)
        weight = stored.weights.find(span.name)
        _copy(reader, path, span.name, weight, span.start, master[place])
        for which, moment in moments.items():
            _copy(
                reader,
                path,
                f"{which} of {span.name}",
                stored.moment(which, span.name),
                span.start,
                moment[place],
            )


def _fill_untrained(engine: Any, stored: OptimizerState, reader: ChecksumReader, path: Path) -> None:
    """Frozen parameters and buffers, in training precision."""
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
        if name in stored.weights.tensors:  # others are not persistent: the model makes them
            _copy(reader, path, name, stored.weights.tensors[name], 0, buffer.view(-1))


def _copy(
    reader: ChecksumReader,
    path: Path,
    name: str,
    stored: TensorReference | None,
    start: int,
    target: torch.Tensor,
) -> None:
    """Elements [start, start + len(target)) of a stored tensor into `target` [elements], which is of its dtype."""
    if stored is None:
        raise UserError(f"{path} has no {name}, which this model trains; it is of another model")
    if stored.dtype != target.dtype:
        raise UserError(f"{path} holds {name} as {stored.dtype}, this run keeps it as {target.dtype}")
    step = CHUNK_BYTES // target.element_size()
    done, position = 0, 0  # elements copied; elements of the pieces before this one
    for piece in stored.ranges:
        first = max(start + done - position, 0)
        end = min(piece.num_elements, start + len(target) - position)
        for begin in range(first, end, step):
            count = min(step, end - begin)
            _read_into(reader, piece, begin, target[done : done + count])
            done += count
        position += piece.num_elements
    if done != len(target):
        raise UserError(
            f"{path}: {name} has {stored.num_elements} elements, this model's has more; it is of another model"
        )


def _read_into(reader: ChecksumReader, piece: ByteRange, start: int, target: torch.Tensor) -> None:
    """Elements of `piece` from `start` on: straight into the memory of a tensor on the CPU, else through a chunk."""
    if target.device.type == "cpu":
        place: Any = target.detach().view(torch.uint8).numpy()
        reader.read(piece, start * piece.dtype.itemsize, memoryview(place))
    else:
        target.copy_(reader.tensor(piece, start, len(target)))


def _check_nothing_left(engine: Any, stored: OptimizerState, path: Path) -> None:
    """Nothing of the checkpoint may be without a place: it would be lost without a word."""
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    shapes |= {name: tuple(buffer.shape) for name, buffer in engine.module.named_buffers()}
    tied = {primary for alias, primary in stored.weights.aliases.items() if alias in shapes}
    for name, tensor in stored.weights.tensors.items():
        if name not in shapes and name not in tied:
            raise UserError(f"{path} holds {name}, which this model does not have")
        if name in shapes and tensor.shape != shapes[name]:
            raise UserError(f"{path}: {name} has shape {tensor.shape}, this model's has {shapes[name]}")


def _spread(optimizer: Any) -> None:
    """The working weights of every rank from the masters, as DeepSpeed does after a step. Collective."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()  # gathers the small parameters that stay whole on every rank
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
