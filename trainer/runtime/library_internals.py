"""Access to private attributes of torch, DeepSpeed and transformers that have no public equivalent.

All attributes were checked with torch 2.13, DeepSpeed 0.19.8 and transformers 5.23. They may change with any release:
`tests/runtime/test_library_internals.py` fails if an attribute is missing in the installed library or works differently.
Libraries are imported inside the functions, so importing this module is fast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def replaced_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Context manager in which the attribute `name` of a module or class is `value`."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


# --- torch ---


def tensor_norms(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the L2 norm of each tensor, accumulated in `dtype`. One kernel computes all norms.

    The public `torch.nn.utils.get_total_norm` sums in the tensors' own dtype.
    """
    import torch

    return list(torch._foreach_norm(list(tensors), 2, dtype=dtype))


def offset_in_file(storage: Any) -> int:
    """Return the offset of a storage's bytes in the file that was loaded with `torch.load(map_location="meta")`.

    No public function returns the offset of a storage on the meta device.
    """
    return int(storage._checkpoint_offset)


def storage_id(tensor: torch.Tensor) -> int:
    """Return the same number for two meta tensors if and only if they share a storage. (On meta, `data_ptr` is always 0.)"""
    return int(tensor.untyped_storage()._cdata)


def is_view(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a view of another tensor. No public function tests this."""
    return tensor._base is not None


def replace_parameter(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    """Replace a parameter by another of the same shape. The hooks of `setattr` and `register_parameter` do not run."""
    before = module._parameters[name]
    assert before is not None and before.shape == parameter.shape
    module._parameters[name] = parameter


def end_allocating_to_pool(device: int, pool: Any) -> None:
    """Stop allocating CUDA memory from a memory pool. `torch.cuda.graph` omits this step after a failed capture.

    Raises RuntimeError if the allocation from the pool has already stopped.
    """
    import torch

    torch._C._cuda_endAllocateToPool(device, pool)


def reorder_linear_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return a copy of a weight in oneDNN's blocked order. torch itself uses this order in `torch.compile` only."""
    import torch

    return torch.ops.mkldnn._reorder_linear_weight(weight)


def linear_by_onednn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a linear layer to rows [..., inputs] on a CPU with oneDNN. In fp32, `F.linear` uses MKL instead.

    `weight`: a plain weight, or the result of `reorder_linear_weight`.
    """
    import torch

    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def set_timeout_of_all_process_groups(seconds: float) -> None:
    """Set the timeout of every process group. The public API sets a timeout only when a group is created.

    DeepSpeed creates its groups with torch's default of 30 minutes.
    """
    import torch.distributed as dist

    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


# --- DeepSpeed ---


def without_weight_broadcast() -> contextlib.AbstractContextManager[None]:
    """Return a context manager in which a new engine does not broadcast rank 0's weights. No setting disables this."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    return replaced_attribute(DeepSpeedEngine, "_broadcast_model", lambda engine: None)


def leave_out_recovery_script(engine: Any) -> None:
    """Make `save_checkpoint` write no `zero_to_fp32.py` beside the checkpoint. No setting disables this file."""
    engine._copy_recovery_script = lambda save_path: None


def update_weights_of_sub_group(optimizer: Any, sub_group: int) -> None:
    """Copy the fp32 master weights of a ZeRO-3 sub-group to the model. The public `step` also updates the master weights."""
    optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)


# --- transformers ---


def without_grouped_products() -> contextlib.AbstractContextManager[None]:
    """Return a context manager in which Mixtures of Experts use transformers' fallback for `torch.nn.functional.grouped_mm`.

    torch's operator has a meta kernel in bf16 only. The fallback has a meta kernel in all dtypes.
    """
    from transformers.integrations import moe

    return replaced_attribute(moe, "_can_use_grouped_mm", lambda *_: False)


def supports_sdpa(model: Any) -> bool:
    """Return whether a model or its class supports sdpa. transformers chooses its default attention by this flag."""
    return bool(model._supports_sdpa)


def can_set_attention(model_class: Any) -> bool:
    """Return whether `set_attn_implementation` has an effect on this class. On other classes, the method only warns."""
    return bool(model_class._can_set_attn_implementation())


def get_attention(config: Any) -> Any:
    """Return the name of a config's attention implementation. No public attribute contains the name."""
    return config._attn_implementation


def set_attention(config: Any, name: str) -> None:
    """Set the attention of a config and its sub-configs, without the checks of `set_attn_implementation`."""
    config._attn_implementation = name


def dtype_plan(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return {name pattern: dtype} for the tensors that `from_pretrained(dtype=dtype)` does not load in `dtype`."""
    return dict(model._get_dtype_plan(dtype))


def weight_conversions(model: Any) -> list[Any]:
    """Return the renamings and conversions applied when this model was loaded. No public attribute contains them."""
    return list(getattr(model, "_weight_conversions", None) or [])


def forget_weight_conversions(model: Any) -> None:
    """Make `save_pretrained` write the parameter names of the model's class, not the names in the loaded files."""
    model._weight_conversions = None


def leave_out_expected_extras(model: Any, info: Any) -> None:
    """Remove from `info` (LoadStateDictInfo) the names that match the ignore patterns of the model's class."""
    model._adjust_missing_and_unexpected_keys(info)


def keys_not_saved(model: Any) -> list[str]:
    """Return the state dict names that `save_pretrained` does not write for this model."""
    return list(model._keys_to_ignore_on_save or ())


def tied_weight_keys(model: Any) -> Any:
    """Return {name of tied weight: name of stored weight} for a model class, or None if no weights are tied."""
    return getattr(model, "_tied_weights_keys", None)


def copy_origin(config: Any, source: Any) -> None:
    """Copy the model name and commit of the config `source` to `config`. The commit has no public attribute."""
    config._name_or_path = source._name_or_path
    config._commit_hash = getattr(source, "_commit_hash", None)


def prepare_cache(model: Any, cache: dict[str, Any], num_rows: int, capacity: int) -> None:
    """Add to the dict `cache` the KV cache that `generate` would use. `capacity`: maximum number of tokens of a row."""
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMode

    model._prepare_cache_for_generation(
        GenerationConfig(), cache, GenerationMode.GREEDY_SEARCH, num_rows, capacity
    )


def split_bloom_heads(layer: Any, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split BLOOM's fused projection. Return query, key and value, each [batch, heads, length, head_dim]."""
    return layer._reshape(fused)


def split_falcon_heads(layer: Any, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split Falcon's fused projection. Return query, key and value, each [batch, length, heads, head_dim]."""
    return layer._split_heads(fused)
