"""A model made for a checkpoint to be read into differs from a loaded one in its weights only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from trainer.models import load

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
CONFIGS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 128},
    "gpt_neox": SMALL,
    "llama": {
        **GROUPED,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_with_a_loaded_models_weights_it_computes_what_that_one_computes(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, **CONFIGS[kind])
    load.write_random_weights(config, 0, tmp_path)
    loaded = load.load_model(tmp_path, "fp32", "sdpa", config=config).eval()
    blank = load.blank_model(config, "fp32", "sdpa").eval()
    for name, buffer in loaded.named_buffers():  # those that no checkpoint holds, e.g. rotary frequencies
        assert torch.equal(buffer, blank.get_buffer(name)), name
    tied = [parameter.data_ptr() for parameter in loaded.state_dict().values()]
    made = [parameter.data_ptr() for parameter in blank.state_dict().values()]
    assert [tied.index(one) for one in tied] == [made.index(one) for one in made]
    with torch.no_grad():
        for name, parameter in blank.named_parameters():
            parameter.copy_(loaded.get_parameter(name))
        tokens = torch.arange(60).unsqueeze(0)
        assert torch.equal(loaded(tokens).logits, blank(tokens).logits)
