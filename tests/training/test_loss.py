"""Packed and padded rows give the same loss and gradient; one pass of the solver equals n separate examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from trainer.models import packed_attention
from trainer.shards.methods import GUIDANCE, SegmentRole, view_of
from trainer.shards.read import Shards
from trainer.training.batches import MicroBatch
from trainer.training.loss import collate, summed_token_loss

CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "gpt2": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=512, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "pythia": GPTNeoXConfig(**SMALL),
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None),
}


def _model(name: str, vocabulary: int, attention: str) -> Any:
    config = CONFIGS[name]
    config.vocab_size = vocabulary
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, None)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)


def _batch(shards: Shards, name: str = "socratic", count: int = 5) -> MicroBatch:
    return MicroBatch(0, list(range(count)), [shards.example(index, view_of(name)) for index in range(count)])


def _gradient(model: Any, batch: MicroBatch, packing: bool) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = summed_token_loss(model, collate(batch, packing, CPU))
    loss.backward()
    return float(loss.detach()), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_is_padded(name: str, stories: Shards) -> None:
    vocabulary = stories.facts["vocabulary_size"]
    batch = _batch(stories)
    loss, gradient = _gradient(_model(name, vocabulary, packed_attention.register()), batch, packing=True)
    padded_loss, padded_gradient = _gradient(_model(name, vocabulary, "eager"), batch, packing=False)
    assert loss == pytest.approx(padded_loss, rel=1e-6)
    assert torch.linalg.norm(gradient - padded_gradient) < 1e-5 * torch.linalg.norm(padded_gradient)


def test_an_empty_batch_has_no_loss_and_no_gradient(stories: Shards) -> None:
    model = _model("llama", stories.facts["vocabulary_size"], packed_attention.register())
    loss, gradient = _gradient(model, MicroBatch(0, [], []), packing=True)
    assert loss == 0
    assert not gradient.any()


def _separate_solver_examples(shards: Shards, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return one example a step, as for a trainer without masks: earlier segments are input, those of the step targets."""
    targets = view_of("solver").targets
    segments = [(role, tokens) for role, tokens in shards.segments(index) if role not in GUIDANCE]
    # The segments of one solution (text, calculator, text) belong to one step; the answer is the last example.
    examples, before, current = [], [], []

    def close() -> None:
        if current:
            tokens = np.concatenate([t for t, _ in before + current])
            loss_mask = np.concatenate(
                [np.zeros(len(t), bool) for t, _ in before] + [np.full(len(t), m) for t, m in current]
            )
            examples.append((tokens.astype(np.int64), loss_mask))
            before.extend(current)
            current.clear()

    for role, tokens in segments:
        if role in targets or role == SegmentRole.CALCULATOR:
            current.append((tokens, role in targets))
        else:
            close()
            before.append((tokens, False))
    close()
    return examples


def test_solver_in_one_pass_is_n_separate_examples(stories: Shards) -> None:
    model = _model("gpt2", stories.facts["vocabulary_size"], packed_attention.register())
    for index in range(3):
        separate = _separate_solver_examples(stories, index)
        assert len(separate) == len(stories.problem(index).steps) + 1
        together = MicroBatch(0, [index], [stories.example(index, view_of("solver"))])
        loss, gradient = _gradient(model, together, packing=True)
        separate_loss, separate_gradient = _gradient(model, MicroBatch(0, [], separate), packing=True)
        assert loss == pytest.approx(separate_loss, rel=1e-6)
        assert torch.linalg.norm(gradient - separate_gradient) < 1e-5 * torch.linalg.norm(gradient)
