"""Map from a rank's optimizer partitions to parameter elements, in a running DeepSpeed 0.19 engine of any ZeRO stage.

Sources, read in DeepSpeed 0.19.8: `runtime/zero/stage_1_and_2.py`, `runtime/bf16_optimizer.py`, `runtime/zero/
stage3.py`. DeepSpeed's own map from parameters to elements (`_hp_mapping`) is wrong with `round_robin_gradients` and
not used: in stages 1 and 2 a parameter's address gives its position in the flat group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Attributes of an optimizer: parameters of each group, their flat tensor, and this rank's partition of the fp32 masters.
_FLAT_GROUPS = (
    ("round_robin_bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups"),
    # stage 1 in bf16 with gradients accumulated in fp32
    ("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition"),
)


@dataclass(frozen=True)
class ParameterSlice:
    """Elements [start, start + count) of the flattened parameter `name`, at `offset` in the partition's tensor."""

    name: str
    start: int
    count: int
    offset: int


@dataclass(frozen=True)
class Partition:
    """fp32 tensor `master` [elements] that this rank's optimizer updates; gaps between `slices` are padding."""

    master: torch.Tensor
    slices: list[ParameterSlice]


def partitions(engine: Any) -> list[Partition]:
    """Return the partitions of this rank's optimizer, in the order of its groups."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(_stage_3_partitions(optimizer, names))
    for attributes in _FLAT_GROUPS:
        if all(hasattr(optimizer, name) for name in attributes):
            parameters, flats, masters = (getattr(optimizer, name) for name in attributes)
            groups = zip(parameters, flats, masters, strict=True)
            return [_flat_partition(*group, engine.global_rank, names) for group in groups]
    return [  # stage 0
        Partition(parameter, [ParameterSlice(names[parameter], 0, parameter.numel(), 0)])
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def optimizer_state(engine: Any, master: torch.Tensor, step: int) -> dict[str, Any]:
    """Return AdamW's state of one partition with `step` set; initialised with zero moments, as in the first step."""
    optimizer = engine.optimizer
    plain = getattr(optimizer, "optimizer", optimizer)  # inside DeepSpeed's wrapper
    state: dict[str, Any] = plain.state[master]
    if not state:
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros_like(master, requires_grad=False)
        group = plain.param_groups[0]
        if isinstance(plain, torch.optim.AdamW | torch.optim.Adam):
            device = master.device if group["fused"] or group["capturable"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    if isinstance(state.get("step"), torch.Tensor):
        state["step"].fill_(step)
    else:  # DeepSpeed's CPU Adam counts in an int
        state["step"] = step
    return state


def _flat_partition(
    parameters: list[torch.nn.Parameter],
    flat: torch.Tensor,
    master: torch.Tensor,
    rank: int,
    names: dict[Any, str],
) -> Partition:
    """Return this rank's partition in stages 1 and 2, where a group's flat tensor is cut into equal parts."""
    begin, end = rank * master.numel(), (rank + 1) * master.numel()
    slices = []
    for parameter in parameters:
        position = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
        assert 0 <= position <= flat.numel() - parameter.numel(), (
            f"{names[parameter]} is not in its group's flat tensor"
        )
        first, last = max(position, begin), min(position + parameter.numel(), end)
        if first < last:
            slices.append(ParameterSlice(names[parameter], first - position, last - first, first - begin))
    return Partition(master, slices)


def _stage_3_partitions(optimizer: Any, names: dict[Any, str]) -> Iterator[Partition]:
    """Yield the sub-groups of stage 3; each concatenates this rank's shards of some parameters."""
    for parameters, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        slices, offset = [], 0
        for parameter in parameters:
            start, count = local_shard(parameter)
            if count:
                slices.append(ParameterSlice(names[parameter], start, count, offset))
            offset += parameter.ds_tensor.ds_numel
        yield Partition(master, slices)


def local_shard(parameter: Any) -> tuple[int, int]:
    """Return the first element and the number of elements of this rank's shard in stage 3, without padding."""
    size = parameter.ds_tensor.ds_numel
    start = torch.distributed.get_rank(parameter.ds_process_group) * size
    return start, max(0, min(size, parameter.ds_numel - start))
