"""`empty_model` returns a model that differs from a loaded one in its weights only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tests.distributed import run_well
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
def test_with_the_weights_of_a_loaded_model_the_logits_are_equal(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, **CONFIGS[kind])
    load.write_random_weights(config, 0, tmp_path)
    loaded = load.load_model(tmp_path, "fp32", "sdpa", config=config).eval()
    blank = load.empty_model(config, "fp32", "sdpa").eval()
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


IN_SHARDS = """
import sys
import deepspeed, torch
from transformers import AutoConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from tests.models.test_empty_model import CONFIGS
from trainer.runtime import distributed, terminal
from trainer.models import load

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
distributed.initialize()
deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False)
config = AutoConfig.for_model(sys.argv[1], **CONFIGS[sys.argv[1]])
plain = load.empty_model(config, "fp32", "sdpa")
held = HfDeepSpeedConfig({"train_batch_size": 2, "zero_optimization": {"stage": 3}})
gathered = []
enter = deepspeed.zero.GatheredParameters.__enter__
deepspeed.zero.GatheredParameters.__enter__ = lambda self: (gathered.append(len(self.params)), enter(self))[1]
blank = load.empty_model(config, "fp32", "sdpa")
deepspeed.zero.GatheredParameters.__enter__ = enter
for name, buffer in plain.named_buffers():
    assert torch.equal(buffer, blank.get_buffer(name)), name
shapes = {name: tuple(parameter.shape) for name, parameter in plain.named_parameters()}
assert shapes == {name: tuple(parameter.ds_shape) for name, parameter in blank.named_parameters()}
assert all(parameter.numel() == 0 for parameter in blank.parameters())
with deepspeed.zero.GatheredParameters(list(blank.parameters())):
    assert shapes == {name: tuple(parameter.shape) for name, parameter in blank.named_parameters()}
terminal.run_main(lambda: print("gathered", sum(gathered)))
"""


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_under_zero_3_it_is_created_in_shards_without_gathering(kind: str) -> None:
    """Gathering would delay a resumed run: the checkpoint overwrites every parameter."""
    assert run_well(["-c", IN_SHARDS, kind], 2).splitlines()[-1] == "gathered 0"
