"""Private attributes of torch, DeepSpeed and transformers, each with the reason why no public one does.

All were checked with torch 2.13, DeepSpeed 0.19.8 and transformers 5.23; a private attribute may change with any release.
`tests/runtime/test_library_internals.py` fails for each that the installed library does not have or that works otherwise.
Libraries are imported inside the functions, so that this module costs nothing to import.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# --- torch ---


def tensor_norms(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the L2 norm of each tensor, accumulated in `dtype`; one kernel instead of one a tensor.

    `torch.nn.utils.get_total_norm` is public, but sums in the tensors' own dtype.
    """
    import torch

    return list(torch._foreach_norm(list(tensors), 2, dtype=dtype))


def offset_in_file(storage: Any) -> int:
    """Return where the bytes of a storage begin in the file that `torch.load(map_location="meta")` described.

    No public function gives the offset of a storage on meta.
    """
    return int(storage._checkpoint_offset)


def storage_id(tensor: torch.Tensor) -> int:
    """Return a number that tensors on meta share if and only if they share a storage; `data_ptr` is 0 there."""
    return int(tensor.untyped_storage()._cdata)


def is_view(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a view of another one. There is no public question for it."""
    return tensor._base is not None


def replace_parameter(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    """Replace a parameter of the same shape without the hooks that `setattr` and `register_parameter` run."""
    before = module._parameters[name]
    assert before is not None and before.shape == parameter.shape
    module._parameters[name] = parameter


def end_allocating_to_pool(device: int, pool: Any) -> None:
    """End what `torch.cuda.graph` leaves begun when its capture fails. Raises RuntimeError if it has ended."""
    import torch

    torch._C._cuda_endAllocateToPool(device, pool)


def reorder_linear_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return a copy of a weight in oneDNN's blocked order. torch uses it in `torch.compile` only."""
    import torch

    reordered: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return reordered


def linear_by_onednn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return rows [..., inputs] times `weight`, plain or reordered; `torch.nn.functional.linear` takes MKL in fp32."""
    import torch

    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def set_timeout_of_all_process_groups(seconds: float) -> None:
    """Set the timeout of every process group. DeepSpeed's have torch's default of 30 minutes.

    The public API sets it at creation only.
    """
    import torch.distributed as dist

    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


# --- DeepSpeed ---


@contextlib.contextmanager
def without_weight_broadcast() -> Iterator[None]:
    """Context manager in which a new engine does not send rank 0's weights to all ranks. No setting turns it off."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = DeepSpeedEngine._broadcast_model
    DeepSpeedEngine._broadcast_model = lambda engine: None
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = original


def leave_out_recovery_script(engine: Any) -> None:
    """Make `save_checkpoint` write no `zero_to_fp32.py` beside the checkpoint. No setting turns it off."""
    engine._copy_recovery_script = lambda save_path: None


def update_weights_of_sub_group(optimizer: Any, sub_group: int) -> None:
    """ZeRO-3: write the masters of a sub-group to the working weights, as `step` does. No public method does it alone."""
    optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)


# --- transformers ---


@contextlib.contextmanager
def without_grouped_products() -> Iterator[None]:
    """Context manager in which a Mixture of Experts multiplies by an operator that knows its shapes in every dtype.

    torch's grouped product knows them in bf16 only; transformers' replacement for it has the same inputs and outputs.
    """
    from transformers.integrations import moe

    original = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = original


def supports_sdpa(model: Any) -> bool:
    """Return whether a model or its class has sdpa attention; transformers decides its default by this flag."""
    return bool(model._supports_sdpa)


def can_set_attention(model_class: Any) -> bool:
    """Return whether `set_attn_implementation` has an effect on this class, which otherwise only warns."""
    return bool(model_class._can_set_attn_implementation())


def get_attention(config: Any) -> Any:
    """Return the name of the attention implementation in use; there is no public attribute for it."""
    return config._attn_implementation


def set_attention(config: Any, name: str) -> None:
    """Set the attention implementation of a config and its sub-configs, without the checks of `set_attn_implementation`."""
    config._attn_implementation = name


def dtype_plan(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return pattern -> dtype for the tensors that `from_pretrained(dtype=...)` keeps in another one."""
    return dict(model._get_dtype_plan(dtype))


def weight_conversions(model: Any) -> list[Any]:
    """Return the renamings and conversions that loading this model applied; nothing public tells of them."""
    return list(getattr(model, "_weight_conversions", None) or [])


def forget_weight_conversions(model: Any) -> None:
    """Make `save_pretrained` write the names of the model's class, not those of the files it was loaded from."""
    model._weight_conversions = None


def leave_out_expected_extras(model: Any, info: Any) -> None:
    """Remove the names from `info` that a model's class says may be missing or unexpected in its files."""
    model._adjust_missing_and_unexpected_keys(info)


def keys_not_saved(model: Any) -> list[str]:
    """Return the names that `save_pretrained` leaves out for this class."""
    return list(model._keys_to_ignore_on_save or ())


def tied_weight_keys(model: Any) -> Any:
    """Return a class's tied weights, name -> the name that holds the weight; None without any."""
    return getattr(model, "_tied_weights_keys", None)


def copy_origin(config: Any, source: Any) -> None:
    """Copy the name and the commit that a config was loaded from; the commit has no public attribute."""
    config._name_or_path = source._name_or_path
    config._commit_hash = getattr(source, "_commit_hash", None)


def prepare_cache(model: Any, cache: dict[str, Any], num_rows: int, capacity: int) -> None:
    """Put the cache that `generate` would make for this model into `cache`, under the model's own name for it."""
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMode

    model._prepare_cache_for_generation(
        GenerationConfig(), cache, GenerationMode.GREEDY_SEARCH, num_rows, capacity
    )


def split_bloom_heads(layer: Any, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value of BLOOM's attention layer, each [batch, heads, length, width]."""
    query, key, value = layer._reshape(fused)
    return query, key, value


def split_falcon_heads(layer: Any, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value of Falcon's attention layer, each [batch, length, heads, width]."""
    query, key, value = layer._split_heads(fused)
    return query, key, value
