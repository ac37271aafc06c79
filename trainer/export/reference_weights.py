"""Independent reconstruction of a checkpoint's weights in memory, as in DeepSpeed's zero_to_fp32.py.

It checks the streaming conversion and shares only file names with it: tensors are loaded with `torch.load`, concatenated,
sliced and, in stages 1 and 2, compared with the model's own weights. Memory: the size of the model.
"""

from __future__ import annotations

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
    """Return every parameter and buffer of a checkpoint in its stored dtype, without tied aliases."""
    model_names, optimizer_names = layout.file_names(zero_stage, world_size, dtype)
    models = [load(directory / name, "cpu", mmap=True) for name in model_names]
    optimizers = [
        load(directory / name, "cpu", mmap=True)["optimizer_state_dict"] for name in optimizer_names
    ]
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
    optimizer = model.get("optimizer") or {}
    groups = optimizer.get("fp32_groups") or optimizer.get("fp32_groups_flat") or []
    lists = [group if isinstance(group, list) else [group] for group in groups]
    flat = [torch.cat([tensor.detach().flatten() for tensor in tensors]) for tensors in lists]
    # Buffers have no masters, but a buffer of zeros may equal a rounded master.
    buffers = set(model["buffer_names"])
    for name, weight in ((name, weight) for name, weight in list(weights.items()) if name not in buffers):
        for index, group in enumerate(flat):
            candidate = group[: weight.numel()]
            if torch.equal(candidate.to(weight.dtype), weight.flatten()):
                weights[name], flat[index] = candidate.view(weight.shape), group[weight.numel() :]
                break
    return weights


def _stage_1_or_2(model: dict[str, Any], optimizers: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    paddings = optimizers[0].get("param_alignment_paddings")
    for index, shapes in enumerate(model["param_shapes"]):
        flat = torch.cat([optimizer["single_partition_of_fp32_groups"][index] for optimizer in optimizers])
        offset = 0
        for number, (name, shape) in enumerate(shapes.items()):
            found[name] = flat[offset : offset + math.prod(shape)].view(shape)
            if not torch.equal(found[name].to(model["module"][name].dtype), model["module"][name]):
                raise UserError(
                    f"{name}: the fp32 weights of the optimizer do not round to the model's weights"
                )
            offset += math.prod(shape) + (paddings[index][number] if paddings else 0)
    rest = {name: tensor for name, tensor in model["module"].items() if name not in found}
    return found | {name: tensor for name, tensor in rest.items() if name not in model["shared_params"]}


def _stage_3(models: list[dict[str, Any]], optimizers: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    flat = [
        torch.cat([group.detach() for group in optimizer["fp32_flat_groups"]]) for optimizer in optimizers
    ]
    offset = 0
    for shapes in models[0]["param_shapes"]:
        for name, shape in shapes.items():
            num_elements = math.ceil(math.prod(shape) / len(flat))
            whole = torch.cat([rank[offset : offset + num_elements] for rank in flat])
            found[name] = whole[: math.prod(shape)].view(shape)
            offset += num_elements
    for name, shape in (models[0]["frozen_param_shapes"] or {}).items():
        whole = torch.cat([model["frozen_param_fragments"][name] for model in models])
        found[name] = whole[: math.prod(shape)].view(shape)
    return found | {name: models[0]["module"][name] for name in models[0]["buffer_names"]}
