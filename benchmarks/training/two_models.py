"""Tokens computed to train a decomposer and a solver for one epoch: python two_models.py masks|apart

masks: the trainer's way, each problem once a model, a mask says what is learned, packs without padding. apart: one
example for every sub-question (decomposer) and every solution (solver), with everything before it, as a trainer without
masks would write them; padded to the longest of a batch of 8, in batches sorted by length. Both print loss and gradient
of both models on the first problems. The last line on stdout is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.training import material
from trainer.models import packed_attention
from trainer.shards.methods import GUIDANCE, view_of
from trainer.shards.read import Shards
from trainer.training.batches import MicroBatch, PackedDataset
from trainer.training.loss import collate, summed_token_loss

MODELS = ("decomposer_interleaved", "solver")
PACK_LENGTH, BATCH, COMPARED = 1024, 8, 4
Example = tuple[np.ndarray, np.ndarray]


def main() -> None:
    apart = sys.argv[1] == "apart"
    shards = material.shards("test_socratic")
    tokens, losses, gradients = 0, [], []
    for name in MODELS:
        if apart:
            tokens += padded_tokens(
                [len(t) for i in range(len(shards)) for t, _ in separate(shards, i, name)]
            )
            examples = [example for i in range(COMPARED) for example in separate(shards, i, name)]
        else:
            data = PackedDataset(shards, name, view_of(name), PACK_LENGTH, seed=0)
            tokens += data.tokens_per_epoch
            examples = [shards.example(index, view_of(name)) for index in range(COMPARED)]
        loss, gradient = loss_and_gradient(examples, packing=not apart)
        losses.append(loss)
        gradients += gradient
    print(json.dumps({"tokens": tokens, "losses": losses, "gradients": gradients}))


def separate(shards: Shards, index: int, name: str) -> list[Example]:
    """One example for every run of segments that the model learns, with all that it reads before."""
    view = view_of(name)
    parts = [
        (role, tokens)
        for role, tokens in shards.segments(index)
        if role not in GUIDANCE and role in view.inputs
    ]
    marks = [role in view.targets for role, _ in parts]
    examples, start = [], 0
    while start < len(parts):
        end = start + 1
        if marks[start]:
            # What the calculator writes inside a solution is read, not learned, and does not end it.
            inside = [
                m or (name == "solver" and role.name == "CALCULATOR")
                for (role, _), m in zip(parts, marks, strict=True)
            ]
            while end < len(parts) and inside[end]:
                end += 1
            tokens = [t for _, t in parts[:end]]
            learned = [np.full(len(t), start <= at and marks[at]) for at, t in enumerate(tokens)]
            examples.append((np.concatenate(tokens).astype(np.int64), np.concatenate(learned)))
        start = end
    return examples


def padded_tokens(lengths: list[int]) -> int:
    """Positions computed in batches sorted by length."""
    lengths = sorted(lengths)
    batches = [lengths[start : start + BATCH] for start in range(0, len(lengths), BATCH)]
    return sum(len(batch) * max(batch) for batch in batches)


def loss_and_gradient(examples: list[Example], packing: bool) -> tuple[float, list[float]]:
    """Sum of the token losses in a small GPT-2 and the norm of every parameter's gradient."""
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(n_layer=2, n_embd=64, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    torch.manual_seed(0)
    attention = packed_attention.register() if packing else "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    loss = summed_token_loss(model, collate(MicroBatch(0, [], examples), packing, torch.device("cpu")))
    loss.backward()
    return float(loss.detach()), [
        float(torch.linalg.norm(parameter.grad)) for parameter in model.parameters()
    ]


if __name__ == "__main__":
    main()
