"""train_many.py with a fault planted in the training code: python train_with_fault.py FAULT RUNS.json [--collect]"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from trainer.models import packed_attention
from trainer.training import model_copy


def ignore_boundaries() -> None:
    """Packed attention treats a pack as one example."""
    right = packed_attention.PackedSequence
    replaced: Any = lambda lengths, bounds, sdpa: right([sum(lengths)], bounds[[0, -1]], sdpa)  # noqa: E731
    packed_attention.PackedSequence = replaced  # type: ignore[misc]


def see_other_rows() -> None:
    """Every layer reads the mean of all tokens of a batch: right only with one example per forward pass."""
    right = LlamaMLP.forward

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return right(self, hidden + 0.01 * hidden.mean((0, 1), keepdim=True))

    LlamaMLP.forward = forward  # type: ignore[method-assign]


def no_memory() -> None:
    """No rank has memory for a copy of the model."""
    model_copy._fits = lambda parameters, copy_all: False


if __name__ == "__main__":
    {fault.__name__: fault for fault in (ignore_boundaries, see_other_rows, no_memory)}[sys.argv.pop(1)]()
    from tests.training import train_many  # noqa: F401 (trains)
