"""Load a checkpoint of any world size and ZeRO stage. Each rank reads only the byte ranges that it needs.

DeepSpeed loads a checkpoint only if world size and stage are unchanged, and every rank unpickles whole files. (DeepSpeed's
universal checkpoints need an offline conversion.) Here the fp32 master weights and the moments of a parameter are byte
ranges of the checkpoint's files (trainer/zero). The ranges are copied into the partitions of the new engine
(partitions.py), even if world size and stage are unchanged.

Memory: at most one chunk of 16 MiB besides the engine. checkpoint.py must check the digests of the files before `load`.
"""

from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.runtime import distributed, library_internals
from trainer.training.partitions import Partition, local_shard, optimizer_state, partitions
from trainer.zero.checksum_reader import CHUNK_BYTES, ChecksumReader
from trainer.zero.optimizer_state import MOMENTS, PARAMETER_NAMES, OptimizerState, read_optimizer_state
from trainer.zero.torch_files import TensorReference


@torch.no_grad()
def load(engine: Any, path: Path, zero_stage: int, world_size: int, dtype: str) -> None:
    """Collective. Load fp32 master weights, moments, step, frozen parameters and buffers into `engine`.

    The working weights (the weights of the forward pass) are computed from the master weights. `zero_stage`, `world_size`,
    `dtype`: from the manifest of the checkpoint. Raises UserError if a file is damaged or the checkpoint belongs to
    another model. Some tensors may already be loaded when the error is raised.
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
    """Return the client state to save: {PARAMETER_NAMES: ordered parameter names} in stage 0, {} in other stages."""
    if engine.zero_optimization():
        return {}
    return {PARAMETER_NAMES: [piece.name for partition in partitions(engine) for piece in partition.slices]}


def _load_partition(
    engine: Any, partition: Partition, stored: OptimizerState, reader: ChecksumReader, path: Path
) -> None:
    state = optimizer_state(engine, partition.master, stored.step)
    for piece in partition.slices:
        elements = slice(piece.offset, piece.offset + piece.count)
        master = partition.master.data.view(-1)[elements]
        _copy(reader, path, piece.name, stored.weights.find(piece.name), piece.start, master)
        for key in MOMENTS:
            moment, name = state[key].view(-1)[elements], f"{key} of {piece.name}"
            _copy(reader, path, name, stored.moment(key, piece.name), piece.start, moment)


def _load_untrained(engine: Any, stored: OptimizerState, reader: ChecksumReader, path: Path) -> None:
    """Load frozen parameters and persistent buffers. Both must have the same dtype in the checkpoint and in the engine."""
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            start, target = 0, parameter.data.view(-1)
            if hasattr(parameter, "ds_tensor"):
                start, count = local_shard(parameter)
                target = parameter.ds_tensor.data.view(-1)[:count]
            _copy(reader, path, name, stored.weights.find(name), start, target)
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
    """Copy `stored`[start : start + len(target)] into `target`. Raises UserError if `stored` is None, too short or of another dtype."""
    if stored is None:
        raise UserError(f"{path} has no {name}, which this model trains; it is a checkpoint of another model")
    if stored.dtype != target.dtype:
        raise UserError(f"{path} holds {name} as {stored.dtype}, this run keeps {name} as {target.dtype}")
    if len(target) and start + len(target) > stored.num_elements:
        raise UserError(
            f"{path}: {name} has {stored.num_elements} elements, this model's has more; it is a checkpoint of another model"
        )
    ranges = stored.slice(start, len(target))
    parts = target.detach().split([byte_range.num_elements for byte_range in ranges])
    for byte_range, part in zip(ranges, parts, strict=True):
        begin = 0

        for chunk in part.split(CHUNK_BYTES // target.element_size()):
            if target.device.type == "cpu":  # read the bytes directly into the tensor
                buffer: Any = chunk.view(torch.uint8).numpy()
                reader.read(byte_range, begin * chunk.element_size(), memoryview(buffer))
            else:
                chunk.copy_(reader.tensor(byte_range, begin, len(chunk)))
            begin += len(chunk)


def _check_shapes(engine: Any, stored: OptimizerState, path: Path) -> None:
    """Raise UserError if the checkpoint has a tensor that the model lacks or has in another shape."""
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    shapes |= {name: tuple(buffer.shape) for name, buffer in engine.module.named_buffers()}
    tied = {primary for alias, primary in stored.weights.aliases.items() if alias in shapes}
    for name, tensor in stored.weights.tensors.items():
        if name not in shapes and name not in tied:
            raise UserError(f"{path} holds {name}, which this model does not have")
        if name in shapes and tensor.shape != shapes[name]:
            raise UserError(f"{path}: {name} has shape {tensor.shape}, in this model {shapes[name]}")


def _update_working_weights(optimizer: Any) -> None:
    """Collective. Compute the working weights of every rank from the master weights, as DeepSpeed does after a step."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for sub_group in range(len(optimizer.fp16_groups)):
            library_internals.update_weights_of_sub_group(optimizer, sub_group)
        optimizer.checkpoint_event_epilogue()  # gathers the small parameters that ZeRO-3 keeps on all ranks
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
