"""Floating-point operations of a token: exactly the computed ones."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from transformers import GPT2Config, LlamaConfig

from trainer.models import load
from trainer.training.throughput import flops_per_token

MATRICES = 2 * 4 * 8 * 8 + 2 * 3 * 8 * 20  # of two layers, width 8, gated MLP of 20


def llama(tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=100, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=20, tie_word_embeddings=tied,
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_counts_at_targets_only(tied: bool) -> None:
    config = llama(tied)
    count = load.num_parameters(config)
    norms = 5 * 8  # vectors count like matrices: the difference is negligible
    attention = 6 * 2 * 8 * 30
    everywhere = 6 * (MATRICES + norms + 100 * 8) + attention
    assert flops_per_token(count, config, mean_length=30) == everywhere
    assert flops_per_token(count, config, 30, target_fraction=0.25) == everywhere - 6 * 0.75 * 100 * 8


def test_gpt2s_own_config_names_are_read() -> None:
    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=100, n_positions=16)
    inside = load.num_parameters(config) - 100 * 8
    assert (
        flops_per_token(load.num_parameters(config), config, 10, 0.5) == 6 * (inside + 400) + 6 * 2 * 8 * 10
    )


def test_a_process_does_not_inherit_the_memory_of_the_one_that_started_it() -> None:
    code = "from trainer.training.throughput import peak_memory_bytes; print(peak_memory_bytes())"
    large = np.ones(3 << 27)  # 3 GiB, all touched
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1e7 < int(child.stdout) < large.nbytes / 2
