"""Reconstruct a checkpoint's weights in memory, as DeepSpeed's zero_to_fp32.py does, to check the streaming conversion.

This module and the conversion share only file names and the call of `torch.load`. Whole tensors are concatenated and
sliced. Memory: the size of the fp32 weights in stages 1 and 2, and twice this size in stage 3.
"""

import math
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.zero import layout
from trainer.zero.torch_files import load


def reference_weights(
    directory: Path, zero_stage: int, world_size: int, dtype: str
) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers of a checkpoint by name, in their stored dtypes. Tied tensors have one name only.

    In stages 1 and 2, raises UserError if the optimizer's fp32 weights do not round to the model's weights.
    """
    model_names, optimizer_names = layout.file_names(zero_stage, world_size, dtype)
    models = [load(directory / name, "cpu", mmap=True) for name in model_names]
    states = (load(directory / name, "cpu", mmap=True) for name in optimizer_names)
    optimizers = [state["optimizer_state_dict"] for state in states]
    if zero_stage == 0:
        return _stage_0(models[0])
    if zero_stage == 3:
        return _stage_3(models, optimizers)
    return _stage_1_or_2(models[0], optimizers)


def _stage_0(model: dict[str, Any]) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    addresses: set[tuple[int, torch.Size]] = set()
    for name, weight in model["module"].items():
        if (weight.data_ptr(), weight.shape) not in addresses:  # not a tied alias
            addresses.add((weight.data_ptr(), weight.shape))
            weights[name] = weight
    return weights


def _stage_1_or_2(model: dict[str, Any], optimizers: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    paddings = optimizers[0].get("param_alignment_paddings")
    for index, shapes in enumerate(model["param_shapes"]):
        flat = torch.cat([optimizer["single_partition_of_fp32_groups"][index] for optimizer in optimizers])
        offset = 0
        for number, (name, shape) in enumerate(shapes.items()):
            weights[name] = flat[offset : offset + math.prod(shape)].view(shape)
            if not torch.equal(weights[name].to(model["module"][name].dtype), model["module"][name]):
                raise UserError(f"{name}: the optimizer's fp32 weights do not round to the model's weights")
            offset += math.prod(shape) + (paddings[index][number] if paddings else 0)
    for name, tensor in model["module"].items():
        if name not in model["shared_params"]:
            weights.setdefault(name, tensor)
    return weights


def _stage_3(models: list[dict[str, Any]], optimizers: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    flat = [torch.cat([group.detach() for group in rank["fp32_flat_groups"]]) for rank in optimizers]
    offset = 0
    for shapes in models[0]["param_shapes"]:
        for name, shape in shapes.items():
            num_elements = math.ceil(math.prod(shape) / len(flat))
            padded = torch.cat([rank[offset : offset + num_elements] for rank in flat])
            weights[name] = padded[: math.prod(shape)].view(shape)
            offset += num_elements
    for name, shape in (models[0]["frozen_param_shapes"] or {}).items():
        padded = torch.cat([model["frozen_param_fragments"][name] for model in models])
        weights[name] = padded[: math.prod(shape)].view(shape)
    return weights | {name: models[0]["module"][name] for name in models[0]["buffer_names"]}
