"""Causal attention over packs: every example of a pack attends to itself alone.

Transformers hands an attention function it does not know no mask at all, and passes extra arguments of the model
call through, so the boundaries of the examples ride along as `cu_seq_lens_q` (the name flash attention gave them).
Without `use_cache=False`, `attention_mask=None` and restarted `position_ids` a model would look across examples
and nobody would say a word; `training/loss.py` gives all three and `training/self_check.py` compares with padding.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from trainer.models.attention_kernels import leave_out_cudnn

NAME = "packed"


def register() -> str:
    """Make the attention known to transformers; returns the name for `attn_implementation`."""
    from transformers import AttentionInterface

    leave_out_cudnn()
    AttentionInterface.register(NAME, attend)
    return NAME


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens, head_dim] -> [1, tokens, heads, head_dim].

    `cu_seq_lens_q` (int32 [examples + 1], on the CPU or the device): where examples start, and the total.
    """
    if cu_seq_lens_q is None or query.shape[0] != 1:
        raise RuntimeError("packed attention needs one row and cu_seq_lens_q")
    window = kwargs.get("sliding_window")
    longest = kwargs.get("max_length_q") or query.shape[2]
    if window is not None and longest > window:
        raise RuntimeError(f"an example of {longest} tokens exceeds the model's sliding window of {window}")
    if dropout == 0.0 and has_kernel(query):
        return varlen(query, key, value, scaling, cu_seq_lens_q, longest), None
    lengths = kwargs["lengths"]
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    # One call per example: work grows with the sum of squared lengths, not with the square of the pack's.
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def has_kernel(query: torch.Tensor) -> bool:
    """Flash attention in torch: Ampere or newer, 16 bits, heads of up to 256 in multiples of 8."""
    head_dim = query.shape[3]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(query.device)[0] >= 8
    )


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    bounds: torch.Tensor,
    longest: int,
    key_bounds: torch.Tensor | None = None,
    longest_key: int | None = None,
) -> torch.Tensor:
    """One kernel for all examples (flash attention inside torch, no extra package); it has no dropout.

    An example that has more keys (`key_bounds`, int32 like `bounds`) than queries: its last query sees its last key.
    """
    from torch.nn.attention.varlen import varlen_attn

    # Not [0], whose gradient is a tensor of zeros to copy into, in an order of axes that has to be copied once more.
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    grouped: dict[str, Any] = {}
    if query.shape[1] != key.shape[1] and _wants_to_be_told_of_groups():
        grouped = {"enable_gqa": True}
    key_bounds = bounds if key_bounds is None else key_bounds
    longest_key = longest if longest_key is None else longest_key
    out = varlen_attn(
        q, k, v, bounds, key_bounds, longest, longest_key, scale=scaling, window_size=(-1, 0), **grouped
    )
    assert isinstance(out, torch.Tensor)  # return_aux was not asked for
    return out.unsqueeze(0)


@functools.cache
def _wants_to_be_told_of_groups() -> bool:
    """From torch 2.12 on; 2.11 takes fewer key-value heads than query heads without a word."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
