"""Transformers 4, in an environment of its own, loads exports with the same weights and logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.export.family_export import randomise_tensors, write_checkpoint
from trainer.export.convert import convert
from trainer.settings import ConvertSettings
from trainer.training.run_files import write_model_files

pytestmark = pytest.mark.slow

VERSION = "4.57.1"
TOKENS = [1, 7, 3, 3, 9, 40, 41, 2]
_SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
# Rotary settings unlike any default: ignoring them changes the logits.
FAMILIES = {
    "gpt_neox": {**_SIZES, "rotary_emb_base": 500, "rotary_pct": 0.5},
    "mixtral": {**_SIZES, **_EXPERTS, "num_local_experts": 4, "rope_theta": 300.0},
    "qwen3_moe": {
        **_SIZES, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, "rope_theta": 300.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    },
}  # fmt: skip

_READER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, __version__
found = {"version": __version__}
for name, folder in json.loads(sys.argv[1]).items():
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([json.loads(sys.argv[2])])).logits
    found[name] = {"logits": logits.tolist(), "report": {key: sorted(map(str, value)) for key, value in report.items()}}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Python of an environment with transformers 4; the variable TRANSFORMERS_4_PYTHON names an existing one."""
    if given := os.environ.get("TRANSFORMERS_4_PYTHON"):
        return given
    folder = tmp_path_factory.mktemp("transformers4") / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    packages = [f"transformers=={VERSION}", f"torch=={torch.__version__.partition('+')[0]}", "numpy"]
    subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", *packages], check=True)
    return str(folder / "bin" / "python")


def test_transformers_4_loads_the_same_model(python: str, tmp_path: Path) -> None:
    exports, expected = {}, {}
    for name, settings in FAMILIES.items():
        exports[name], expected[name] = _export(name, settings, tmp_path / name)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run(
        [python, "-c", _READER, json.dumps({name: str(path) for name, path in exports.items()}), json.dumps(TOKENS)],
        capture_output=True, text=True, cwd=tmp_path, env=environment | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["version"] == VERSION
    for name, logits in expected.items():
        assert not any(found[name]["report"].values()), found[name]["report"]
        torch.testing.assert_close(torch.tensor(found[name]["logits"]), logits, rtol=1e-5, atol=1e-5)


def _export(name: str, settings: dict, folder: Path) -> tuple[Path, torch.Tensor]:
    """Export a small untrained model; return the export and the logits of the model."""
    config = AutoConfig.for_model(name, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise_tensors(model)
    model.save_pretrained(folder / "base")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(settings["vocab_size"])}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")
    write_model_files(folder / "model", str(folder / "base"), config, tokenizer)
    checkpoint = write_checkpoint(model, folder / "run/checkpoints/step-000001", "fp32", folder / "model")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS])).logits
    return convert(ConvertSettings(str(checkpoint), verify=True)), logits
