"""Compare packed attention on this device with the attention of every example alone: outputs and gradients.

The reference is written out in fp32: scores, mask, softmax. In bf16 the error of packed attention may be at most twice
that of torch's attention over single examples. The last line on stdout is JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function

from trainer.models import load, packed_attention
from trainer.models.default_attention import MaskPattern
from trainer.models.packed_attention import PackedSequence, PackMask

LENGTHS = (3, 130, 1, 257, 64)
SHAPES = ((4, 4, 64), (4, 2, 64), (2, 2, 128), (6, 6, 16))  # heads, key-value heads, head size
FP32_TOLERANCE = 1e-5


def main() -> None:
    failures, details = [], {}
    for heads, groups, size in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{heads} heads, {groups} key-value heads of {size}, {str(dtype).removeprefix('torch.')}"
            packed, single = errors(heads, groups, size, dtype)
            allowed = FP32_TOLERANCE if dtype == torch.float32 else 2 * single + 1e-3
            details[name] = {"packed": packed, "alone": single, "allowed": allowed}
            if not packed <= allowed:
                failures.append(f"{name}: off by {packed:.2e}, allowed {allowed:.2e}")
    heads = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device=load.local_device())
    kernel = packed_attention.has_kernel(heads, heads)
    print(
        json.dumps({"checks": len(details), "failures": failures, "one_kernel": kernel, "details": details})
    )


def errors(heads: int, groups: int, size: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return the errors against the reference, of outputs and gradients: packed, and example by example."""
    device, total = load.local_device(), sum(LENGTHS)
    random = torch.Generator().manual_seed(0)
    shapes = ((1, heads, total, size), (1, groups, total, size), (1, groups, total, size))
    given = [torch.randn(shape, generator=random).to(device).to(dtype) for shape in shapes]
    weight = torch.randn(1, total, heads, size, generator=random).to(device).to(dtype)
    wanted = with_gradients(reference, [tensor.float() for tensor in given], weight.float())
    packed = with_gradients(attend, given, weight)
    alone = with_gradients(one_by_one, given, weight)
    return distance(packed, wanted), distance(alone, wanted)


def with_gradients(function: Any, given: list[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    out = function(*leaves)
    out.backward(weight)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def causal_pack_mask(lengths: Sequence[int], cu_seqlens: torch.Tensor) -> PackMask:
    """Return the mask of plain causal attention over a pack. With this mask, packed attention needs no model."""
    pattern = MaskPattern(causal_mask_function, math.inf)  # type: ignore[arg-type]
    return PackMask(PackedSequence(lengths, cu_seqlens, use_sdpa=True), pattern)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    ends = torch.tensor([0, *LENGTHS], device=query.device).cumsum(0).int()
    mask = causal_pack_mask(LENGTHS, ends)
    out, _ = packed_attention.attend(torch.nn.Module(), query, key, value, mask)
    return out


def one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    parts = zip(*(tensor.split(LENGTHS, 2) for tensor in (query, key, value)), strict=True)
    attention = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in parts], 2).transpose(
        1, 2
    )


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return attention over all tokens, with later tokens and other examples masked."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    example = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).to(query.device)
    position = torch.arange(len(example), device=query.device)
    visible = (example[:, None] == example) & (position[:, None] >= position)
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    return (scores.masked_fill(~visible, -math.inf).softmax(-1) @ value).transpose(1, 2)


def distance(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Return the largest relative difference in norm."""
    pairs = zip(found, wanted, strict=True)
    return max(float((one.float() - other).norm() / other.norm()) for one, other in pairs)


if __name__ == "__main__":
    main()
