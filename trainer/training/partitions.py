"""Map from a rank's optimizer partitions to parameter elements, in a running DeepSpeed 0.19 engine of any ZeRO stage.

Sources (DeepSpeed 0.19.8): `runtime/zero/stage_1_and_2.py`, `runtime/bf16_optimizer.py`, `runtime/zero/stage3.py`.
DeepSpeed's own map from parameters to elements (`_hp_mapping`) is not used, because it is wrong with
`round_robin_gradients`. In stages 1 and 2, the address of a parameter gives its position in the flat tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Each tuple has the names of three optimizer attributes. An attribute is a list with one item per parameter group. The
# items are the group's parameters, the group's flat tensor, and this rank's fp32 partition of the group.
_FLAT_GROUPS = (
    ("round_robin_bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups"),
    # stage 1 in bf16 with gradient accumulation in fp32
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
    """The fp32 tensor `master` that this rank's optimizer updates. Elements of `master` outside all `slices` are padding."""

    master: torch.Tensor
    slices: list[ParameterSlice]


def partitions(engine: Any) -> list[Partition]:
    """Return the partitions of this rank's optimizer, in the order of the parameter groups (stage 3: of the sub-groups)."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(_stage_3_partitions(optimizer, names))
    for attributes in _FLAT_GROUPS:
        if all(hasattr(optimizer, name) for name in attributes):
            groups = zip(*(getattr(optimizer, name) for name in attributes), strict=True)
            return [_flat_partition(engine.global_rank, names, *group) for group in groups]
    return [  # stage 0
        Partition(parameter, [ParameterSlice(names[parameter], 0, parameter.numel(), 0)])
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def optimizer_state(engine: Any, master: torch.Tensor, step: int) -> dict[str, Any]:
    """Set the step in AdamW's state of the partition `master`, and return the state. A new state has zero moments."""
    plain = getattr(engine.optimizer, "optimizer", engine.optimizer)  # the optimizer that DeepSpeed wraps
    state: dict[str, Any] = plain.state[master]
    if not state:
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros_like(master, requires_grad=False)
        if isinstance(plain, torch.optim.AdamW | torch.optim.Adam):
            group = plain.param_groups[0]
            device = master.device if group["fused"] or group["capturable"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    if isinstance(state.get("step"), torch.Tensor):
        state["step"].fill_(step)
    else:  # in DeepSpeed's CPU Adam, the step is an int
        state["step"] = step
    return state


def _flat_partition(
    rank: int, names: dict[Any, str], parameters: Any, flat: torch.Tensor, master: torch.Tensor
) -> Partition:
    """Return this rank's partition in stages 1 and 2. A group's flat tensor has one part per rank, all of equal size."""
    begin, end = rank * master.numel(), (rank + 1) * master.numel()
    slices = []
    for parameter in parameters:
        position = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
        assert 0 <= position <= flat.numel() - parameter.numel(), (
            f"{names[parameter]} is outside the flat tensor"
        )
        first, last = max(position, begin), min(position + parameter.numel(), end)
        if first < last:
            slices.append(ParameterSlice(names[parameter], first - position, last - first, first - begin))
    return Partition(master, slices)


def _stage_3_partitions(optimizer: Any, names: dict[Any, str]) -> Iterator[Partition]:
    """Yield one partition per sub-group of stage 3. A sub-group concatenates this rank's shards of some parameters."""
    for parameters, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        slices, offset = [], 0
        for parameter in parameters:
            start, count = local_shard(parameter)
            if count:
                slices.append(ParameterSlice(names[parameter], start, count, offset))
            offset += parameter.ds_tensor.ds_numel
        yield Partition(master, slices)


def local_shard(parameter: Any) -> tuple[int, int]:
    """Return (first element, number of elements without padding) of this rank's shard of a stage 3 parameter."""
    size = parameter.ds_tensor.ds_numel
    start = torch.distributed.get_rank(parameter.ds_process_group) * size
    return start, max(0, min(size, parameter.ds_numel - start))
