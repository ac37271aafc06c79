"""Problems and student of the evaluation suite, made once under build/benchmarks/evaluation.

A speed is only worth something on answers of natural lengths, with calculator annotations and ends, from matrices of
a real size; and training a model of that size takes longer than the benchmarks may. So a small GPT-2 learns the
problems by heart, in about 60 epochs, and is then widened and deepened to 6 x 384 without changing what it computes
(Chen, Goodfellow, Shlens: Net2Net, ICLR 2016). Its greedy texts are the data's but for a few: 60 to 276 tokens, 134 in
the mean.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.harness import MATERIALS
from benchmarks.training.material import data_folder
from trainer.models.tokenizer import load_tokenizer
from trainer.settings import PrepareSettings
from trainer.shards.methods import VIEWS
from trainer.shards.prepare import prepare
from trainer.shards.read import Shards
from trainer.storage import atomic_dir

FOLDER = MATERIALS / "evaluation"
NUM_PROBLEMS = 64
METHOD = "socratic"
STUDENTS = ("student", "decomposer", "solver")
MAX_NEW_TOKENS = 400
_COPIES = 3  # of every hidden unit and every head
_SMALL = {"n_layer": 2, "n_embd": 128, "n_head": 2}
_LARGE = {"n_layer": 6, "n_embd": 128 * _COPIES, "n_head": 2 * _COPIES}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_ROWS, _MAX_EPOCHS, _TARGET_LOSS, _IGNORED = 16, 300, 0.03, -100


def shards() -> Shards:
    """The first problems of GSM8K's test set with sub-questions, in GPT-2's tokens."""
    data = data_folder()
    return prepare(
        PrepareSettings(
            data="gsm8k",
            data_path=str(data / "gsm8k"),
            split="test_socratic",
            tokenizer_name=str(data / "gpt2-tokenizer"),
            output_dir=str(FOLDER / "shards"),
            max_problems=NUM_PROBLEMS,
            num_processes=1,
        )
    )


def student(name: str = "student") -> Path:
    """An export of a `socratic` student that writes the problems' own solutions; equal weights under every name."""
    path = FOLDER / name
    if atomic_dir.is_complete(path):
        return path
    found = shards()
    if name == "student":
        torch.manual_seed(0)
        model = _enlarged(_learned_by_heart(found), found)
    else:
        model = GPT2LMHeadModel.from_pretrained(student())
    facts = {
        "method": METHOD,
        "num_parameters": model.num_parameters(),
        "finished": True,
        "tokenizer_fingerprint": found.facts["tokenizer_fingerprint"],
    }
    with atomic_dir.atomic_directory(path, "export", facts) as staging:
        model.save_pretrained(staging)
        load_tokenizer(found.tokenizer_path).save_pretrained(staging)
    return path


def _learned_by_heart(found: Shards) -> GPT2LMHeadModel:
    """A small model over the tokens that occur alone, numbered as in `_vocabulary`; it learns all that is not prompt."""
    vocabulary = _vocabulary(found)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary), **_SMALL, **_NO_DROPOUT))
    batches = _batches(found, vocabulary)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 20)
    for epoch in range(_MAX_EPOCHS):
        largest = 0.0
        for number in torch.randperm(len(batches)).tolist():
            inputs, labels = batches[number]
            logits = model(inputs, use_cache=False).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            largest = max(largest, loss.item())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            warm_up.step()
        print(f"  by heart, epoch {epoch + 1}: loss {largest:.3f}", file=sys.stderr, flush=True)
        if largest < _TARGET_LOSS:
            return model
    raise RuntimeError(f"after {_MAX_EPOCHS} epochs the loss is still {largest:.3f}")


def _batches(found: Shards, vocabulary: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Padded inputs and labels [_ROWS, tokens], examples of like length together."""
    inputs, labels = [], []
    for index in range(len(found)):
        tokens = torch.from_numpy(found.example(index, VIEWS[METHOD])[0].astype("int64"))
        inputs.append(torch.searchsorted(vocabulary, tokens))
        labels.append(inputs[-1].clone())
        labels[-1][: len(found.prompt(index))] = _IGNORED
    order = sorted(range(len(found)), key=lambda index: len(inputs[index]))
    return [
        (
            pad_sequence([inputs[row] for row in order[start : start + _ROWS]], True, 0),
            pad_sequence([labels[row] for row in order[start : start + _ROWS]], True, _IGNORED),
        )
        for start in range(0, len(order), _ROWS)
    ]


def _vocabulary(found: Shards) -> torch.Tensor:
    """Tokens that occur, ascending; [tokens that occur] int64."""
    return torch.unique(torch.from_numpy(found.tokens.astype("int64")))


def _enlarged(small: GPT2LMHeadModel, found: Shards) -> GPT2LMHeadModel:
    """The same function in a larger shape.

    Every hidden unit and every head is there `_COPIES` times, side by side: layer norms see the same mean and variance, and
    what sums over copies is divided by their number. Further layers add zero. Tokens that never occurred have an
    embedding of zeros, hence a logit of zero, which is below that of what was learned.
    """
    config = GPT2Config(vocab_size=found.facts["vocabulary_size"], **_LARGE, **_NO_DROPOUT)
    large = GPT2LMHeadModel(config)
    learned = small.state_dict()
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            if (
                name not in learned
            ):  # of a further layer; its projections back into the hidden state write zeros
                if "c_proj" in name:
                    parameter.zero_()
                continue
            parameter.copy_(_copies(name, learned[name], _vocabulary(found), len(parameter)))
    return large.eval()


def _copies(name: str, old: torch.Tensor, vocabulary: torch.Tensor, rows: int) -> torch.Tensor:
    if "wte" in name:
        return old.new_zeros(rows, old.shape[1] * _COPIES).index_copy_(0, vocabulary, old.repeat(1, _COPIES))
    if "wpe" in name:
        return old.repeat(1, _COPIES)
    if "ln_f" in name:  # the head, tied to the embedding, sums over the copies
        return old.repeat(_COPIES) / _COPIES
    parts = old.chunk(3, -1) if "c_attn" in name else (old,)  # queries, keys and values lie side by side
    if old.ndim == 1:
        return torch.cat([part.repeat(_COPIES) for part in parts])
    return torch.cat([part.repeat(_COPIES, _COPIES) / _COPIES for part in parts], 1)


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    for name in STUDENTS:
        print(student(name))
