"""Layouts: ways to split a micro-batch into forward passes, and to arrange the examples of a forward pass in rows.

All layouts that pass layout_check.py for a model give the same loss and gradient, except for rounding. The packed layout
is the fastest. Padded rows are for model families whose layers mix the examples of a pack. In some families, padding changes
the logits of a row: sparse attention selects padding, recurrent layers read padding, and LongRoPE depends on the longest
row. For these families, a forward pass takes only examples of equal length, or a single example.
"""

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
    PADDED: "one example in each row, padded",
    EQUAL_LENGTH: "rows of equal length, a forward pass for each length",
    ONE_BY_ONE: "a forward pass for each example",
}


@dataclass(frozen=True)
class BatchLayout:
    """Row arrangement (a key of `DESCRIPTIONS`) and name of an attention implementation of transformers."""

    arrangement: str
    attention: str

    @property
    def is_packed(self) -> bool:
        return self.arrangement == PACKED

    def __str__(self) -> str:
        return f"{self.arrangement} (attention {self.attention})"


def candidates(config: Any, packing: str) -> list[BatchLayout]:
    """Return the layouts to try, the fastest first. Reads no weights.

    `packing`: "auto" (all layouts), "true" (only the packed layout) or "false" (all layouts except the packed layout).
    """
    default = load.default_attn_implementation(config)
    tried = [] if packing == "false" else [BatchLayout(PACKED, packed_attention.register())]
    if packing != "true":
        tried.append(BatchLayout(PADDED, default))
        if default != "eager" and can_set_attention(model_class(config)):
            tried.append(BatchLayout(PADDED, "eager"))
        tried += [BatchLayout(EQUAL_LENGTH, default), BatchLayout(ONE_BY_ONE, default)]
    return tried


def group_examples(lengths: Sequence[int], arrangement: str) -> list[list[int]]:
    """Return one list of example indices per forward pass. Without examples, return [[]]."""
    indices = list(range(len(lengths)))
    if arrangement in (PACKED, PADDED) or not indices:
        return [indices]
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(index if arrangement == ONE_BY_ONE else lengths[index], []).append(index)
    return list(groups.values())


def split_into_batches(
    batch: MicroBatch, layout: BatchLayout, device: torch.device, num_passes: int = 0
) -> list[PackedBatch | PaddedBatch]:
    """Return one batch for each forward pass of a micro-batch, then empty batches until there are `num_passes` batches."""
    groups = group_examples([len(tokens) for tokens, _ in batch.examples], layout.arrangement)
    groups += [[]] * (num_passes - len(groups))
    passes = (dataclasses.replace(batch, examples=[batch.examples[i] for i in group]) for group in groups)
    return [collate(examples, layout.is_packed, device) for examples in passes]


def max_passes(data: PackedDataset, packs_of_ranks: Sequence[range], end: int, arrangement: str) -> int:
    """Return the maximum over the ranks of the number of forward passes that a rank needs for one micro-batch.

    `packs_of_ranks`: the packs of each rank's micro-batch. A pack with an index of `end` or more counts as empty. All
    ranks must run the maximum number of passes, because ZeRO-3 gathers the weights in each pass. The ranks need no
    communication, because every rank can compute which examples are in the packs of all ranks.
    """
    if arrangement in (PACKED, PADDED):
        return 1
    return max(len(group_examples(data.lengths(packs, end), arrangement)) for packs in packs_of_ranks)


def passes_of_step(data: PackedDataset, plan: BatchPlan, step: int, arrangement: str) -> list[int]:
    """Return the number of forward passes for each micro-batch of a step. The numbers are equal on all ranks."""
    _, end = plan.pack_range(step)
    ranks = [plan.micro_batches(step, rank) for rank in range(plan.world_size)]
    return [max_passes(data, packs, end, arrangement) for packs in zip(*ranks, strict=True)]
