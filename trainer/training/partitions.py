"""Which elements of which parameter a rank's optimizer keeps, in a live DeepSpeed 0.19 engine of any ZeRO stage.

Sources, read in DeepSpeed 0.19.8: `runtime/zero/stage_1_and_2.py`, `runtime/bf16_optimizer.py`, `runtime/zero/
stage3.py`. DeepSpeed's own map from parameters to elements (`_hp_mapping`) is wrong with `round_robin_gradients`, so
none of it is used: in stages 1 and 2 a parameter's memory tells where it lies in the flat group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Where an optimizer keeps its groups' parameters, the flat tensor they lie in, and this rank's part of the fp32 masters.
_FLAT_GROUPS = (
    ("round_robin_bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups"),
    # stage 1 in bf16 with gradients accumulated in fp32
    ("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition"),
)


@dataclass(frozen=True)
class ParameterSlice:
    """Elements [start, start + count) of the flattened parameter `name` lie at `offset` of the partition's tensor."""

    name: str
    start: int
    count: int
    offset: int


@dataclass(frozen=True)
class Partition:
    """`master` [elements] fp32: what the plain optimizer updates on this rank; gaps between spans are padding."""

    master: torch.Tensor
    slices: list[ParameterSlice]


def partitions(engine: Any) -> list[Partition]:
    """All that this rank's optimizer keeps, in the order of its groups."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(_stage_3(optimizer, names))
    for attributes in _FLAT_GROUPS:
        if all(hasattr(optimizer, name) for name in attributes):
            parts, flats, masters = (getattr(optimizer, name) for name in attributes)
            groups = zip(parts, flats, masters, strict=True)
            return [_part_of_flat(*group, engine.global_rank, names) for group in groups]
    return [
        Partition(parameter, [ParameterSlice(names[parameter], 0, parameter.numel(), 0)])
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def optimizer_state(engine: Any, master: torch.Tensor) -> dict[str, Any]:
    """AdamW's state of one partition, as the first step would make it: zeros of the partition's shape, step 0."""
    optimizer = engine.optimizer
    plain = getattr(optimizer, "optimizer", optimizer)  # DeepSpeed's wrappers hold the plain one
    state = plain.state[master]
    if not state:
        for which in ("exp_avg", "exp_avg_sq"):
            state[which] = torch.zeros_like(master, requires_grad=False)
        group = plain.param_groups[0]
        if isinstance(plain, torch.optim.AdamW | torch.optim.Adam):
            on = master.device if group["fused"] or group["capturable"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=on)
        else:  # DeepSpeed's own count in a plain number
            state["step"] = 0
    return state


def set_step(state: dict[str, Any], step: int) -> None:
    if isinstance(state["step"], torch.Tensor):
        state["step"].fill_(step)
    else:
        state["step"] = step


def _part_of_flat(
    parameters: list[torch.nn.Parameter],
    flat: torch.Tensor,
    master: torch.Tensor,
    rank: int,
    names: dict[Any, str],
) -> Partition:
    """Stages 1 and 2: the group is one flat tensor, cut into equal parts regardless of parameters."""
    begin, end = rank * master.numel(), (rank + 1) * master.numel()
    spans = []
    for parameter in parameters:
        place = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
        assert 0 <= place <= flat.numel() - parameter.numel(), (
            f"{names[parameter]} left its group's flat tensor"
        )
        first, last = max(place, begin), min(place + parameter.numel(), end)
        if first < last:
            spans.append(ParameterSlice(names[parameter], first - place, last - first, first - begin))
    return Partition(master, spans)


def _stage_3(optimizer: Any, names: dict[Any, str]) -> Iterator[Partition]:
    """Stage 3: every parameter is cut into equal shares; a sub-group joins the shares of some parameters."""
    for parameters, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        spans, offset = [], 0
        for parameter in parameters:
            share = parameter.ds_tensor.ds_numel
            start, count = local_shard(parameter)
            if count:
                spans.append(ParameterSlice(names[parameter], start, count, offset))
            offset += share
        yield Partition(master, spans)


def local_shard(parameter: Any) -> tuple[int, int]:
    """Stage 3: first element and number of elements of a parameter that this rank holds (without padding)."""
    share = parameter.ds_tensor.ds_numel
    start = torch.distributed.get_rank(parameter.ds_process_group) * share
    return start, max(0, min(share, parameter.ds_numel - start))
