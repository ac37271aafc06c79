"""Layouts: ways to arrange the examples of a micro-batch in rows of forward passes.

All layouts that are right for a model (layout_check.py) give the same loss and gradient. Packed is the fastest. Padded
rows are for families whose layers mix packed examples. Some families compute other numbers for a padded row than for
the row alone (sparse attention also chooses padding, recurrent layers read it, LongRoPE depends on the longest row):
their examples are put in rows of equal length, or one at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.models import load, packed_attention
from trainer.models.default_attention import can_set_attention
from trainer.models.text_part import model_class
from trainer.training.batches import BatchPlan, MicroBatch, PackedDataset
from trainer.training.loss import PackedBatch, PaddedBatch, collate

PACKED = "packed"
PADDED = "padded"
EQUAL_LENGTH = "equal lengths"
ONE_BY_ONE = "one example"
DESCRIPTIONS = {
    PACKED: "whole examples in one row",
    PADDED: "one example a row, padded",
    EQUAL_LENGTH: "rows of equal length, a forward pass for each length",
    ONE_BY_ONE: "a forward pass for each example",
}


@dataclass(frozen=True)
class BatchLayout:
    """Row arrangement (a key of `DESCRIPTIONS`) and transformers' attention implementation."""

    arrangement: str
    attention: str

    @property
    def is_packed(self) -> bool:
        return self.arrangement == PACKED

    def __str__(self) -> str:
        return f"{self.arrangement} (attention {self.attention})"


def candidates(config: Any, packing: str) -> list[BatchLayout]:
    """Return the layouts to try, the fastest first, without reading weights.

    `packing`: "auto", "true" (packed or nothing) or "false" (never packed).
    """
    default = load.default_attn_implementation(config)
    found = [] if packing == "false" else [BatchLayout(PACKED, packed_attention.register())]
    if packing != "true":
        found.append(BatchLayout(PADDED, default))
        if default != "eager" and can_set_attention(model_class(config)):
            found.append(BatchLayout(PADDED, "eager"))
        found += [BatchLayout(EQUAL_LENGTH, default), BatchLayout(ONE_BY_ONE, default)]
    return found


def group_examples(lengths: Sequence[int], arrangement: str) -> list[list[int]]:
    """Return the indices of the examples of each forward pass; without examples one empty pass."""
    indices = list(range(len(lengths)))
    if arrangement in (PACKED, PADDED) or not indices:
        return [indices]
    if arrangement == ONE_BY_ONE:
        return [[index] for index in indices]
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    return list(groups.values())


def split_into_batches(
    batch: MicroBatch, layout: BatchLayout, device: torch.device, num_passes: int = 0
) -> list[PackedBatch | PaddedBatch]:
    """Return the rows of each forward pass of a micro-batch, with passes without loss up to `num_passes`."""
    groups = group_examples([len(tokens) for tokens, _ in batch.examples], layout.arrangement)
    groups += [[]] * (num_passes - len(groups))
    return [
        collate(
            dataclasses.replace(batch, examples=[batch.examples[index] for index in group]),
            layout.is_packed,
            device,
        )
        for group in groups
    ]


def max_passes(data: PackedDataset, packs_of_ranks: Sequence[range], end: int, rows: str) -> int:
    """Return the largest number of forward passes that any rank needs for its packs; packs from `end` on are empty.

    All ranks must make that many, because ZeRO-3 gathers the weights in each. No communication: every rank can compute
    the packs of all.
    """
    if rows in (PACKED, PADDED):
        return 1
    return max(len(group_examples(data.lengths(packs, end), rows)) for packs in packs_of_ranks)


def passes_of_step(data: PackedDataset, plan: BatchPlan, step: int, rows: str) -> list[int]:
    """Return the number of forward passes of each micro-batch of a step, the same on every rank."""
    _, end = plan.packs(step)
    ranks = [plan.micro_batches(step, rank) for rank in range(plan.world_size)]
    return [
        max_passes(data, [of_rank[micro] for of_rank in ranks], end, rows)
        for micro in range(plan.accumulation_steps)
    ]
