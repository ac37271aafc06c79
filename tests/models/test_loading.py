"""Errors for folders with missing, unexpected or quantised weights and adapters; loading of wrappers' text parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.distributed import Ranks, run_well
from trainer.errors import UserError
from trainer.models import load
from trainer.models.source import check_trainable

TEXT: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "vocab_size": 503,
}  # fmt: skip
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
ROPE = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 128,
}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": TEXT, "vision_config": VISION},
    "gemma4": {
        "text_config": {
            **TEXT, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 503,
            "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
        },
    },
    "qwen3_5": {
        "text_config": {**TEXT, **LINEAR},
        "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64},
    },
    "llama4": {
        "text_config": {**TEXT, "intermediate_size_mlp": 96, "num_local_experts": 2, "interleave_moe_layer_step": 2},
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
            "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
            "pixel_shuffle_ratio": 0.5,
        },
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "ministral3", "rope_parameters": ROPE},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def _tiny(folder: Path, **changes: Any) -> Path:
    values = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**values, **heads, **changes})).save_pretrained(folder)
    return folder


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _configure(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def _drop(*names: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: [weights.pop(name) for name in names]


def _prefix(weights: dict[str, torch.Tensor]) -> None:
    for name in list(weights):
        weights[f"module.{name}"] = weights.pop(name)


def test_missing_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = _edit(_tiny(tmp_path / "m"), _drop("lm_head.weight", "model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(
        UserError, match=r"2 weights the model needs .*\(lm_head.weight, model.layers.0.mlp.up_proj"
    ):
        load.load_model(folder, "fp32")


def test_weights_under_another_prefix_are_refused_and_both_names_are_shown(tmp_path: Path) -> None:
    folder = _edit(_tiny(tmp_path / "m"), _prefix)
    with pytest.raises(
        UserError, match=r"21 weights the model needs .* its files hold module.lm_head.weight"
    ):
        load.load_model(folder, "fp32")


def test_weights_of_another_shape_are_refused_with_both_shapes(tmp_path: Path) -> None:
    folder = _configure(_tiny(tmp_path / "m"), vocab_size=120)
    with pytest.raises(UserError, match=r"lm_head.weight: \[100, 32\] in the file, \[120, 32\] in the model"):
        load.load_model(folder, "fp32")


def test_unexpected_weights_are_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _edit(
        _tiny(tmp_path / "m"), lambda weights: weights.update({"value_head.weight": torch.zeros(3)})
    )
    load.load_model(folder, "fp32")
    assert "holds 1 weight the model does not use (value_head.weight)" in capsys.readouterr().out


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    folder = _tiny(tmp_path / "m", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load.load_model(folder, "fp32")
    assert model.lm_head.weight is model.model.embed_tokens.weight


PADDED = {
    "youtu": {
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "hidden_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96, "vocab_size": 100,
    },
    "recurrent_gemma": {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 100,
        "lru_width": 64, "head_dim": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PADDED)
def test_the_row_of_the_padding_token_is_kept(name: str, tmp_path: Path) -> None:
    """transformers zeroes it after loading, although training may have changed it."""
    config = AutoConfig.for_model(name, **PADDED[name], pad_token_id=3)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path)
    expected = model.get_input_embeddings().weight
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings().weight
    assert expected[3].any()
    assert plain[3].any() == (name != "youtu")  # transformers still has the error
    assert torch.equal(load.load_model(tmp_path, "fp32").get_input_embeddings().weight, expected)


UNDER_ZERO_3 = """
import sys
import deepspeed
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from trainer.runtime import distributed, terminal
from trainer.models import load

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
distributed.initialize()
deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False)
held = HfDeepSpeedConfig({"train_batch_size": 2, "zero_optimization": {"stage": 3}})
terminal.run_main(lambda: print("loaded", type(load.load_model(sys.argv[1], "fp32")).__name__))
"""


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_drop("model.norm.weight"), "1 weight the model needs is not in its files (model.norm.weight)"),
        (
            lambda weights: weights.update({"lm_head.weight": torch.zeros(90, 32)}),
            "size mismatch for lm_head.weight",
        ),
    ],
    ids=["missing", "mismatched"],
)
def test_under_zero_3_every_rank_refuses(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], problem: str
) -> None:
    """Only rank 0 reads the weights: without the error the other rank would wait until its timeout."""
    folder = _edit(_tiny(tmp_path / "m"), change)
    with Ranks(["-c", UNDER_ZERO_3, str(folder)], 2) as ranks:
        outcomes = ranks.wait(120)
    assert [outcome.status for outcome in outcomes] == [2, 2]
    assert problem in outcomes[0].output


def test_under_zero_3_unexpected_weights_are_named_and_tied_ones_are_not_missing(tmp_path: Path) -> None:
    folder = _tiny(tmp_path / "m", tie_word_embeddings=True)
    _edit(folder, lambda weights: weights.update({"value_head.weight": torch.zeros(3)}))
    output = run_well(["-c", UNDER_ZERO_3, str(folder)], 2)
    assert "1 weight the model does not use (value_head.weight)" in output
    assert "loaded LlamaForCausalLM" in output


def _adapter(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    return folder


def _gguf(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF")
    return folder


def _quantised(method: str, **values: object) -> Callable[[Path], Path]:
    return lambda folder: _configure(_tiny(folder), quantization_config={"quant_method": method, **values})


def _replace(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (_tiny(folder) / name).write_bytes(content)
        return folder

    return make


def _pickle(folder: Path) -> Path:
    (_tiny(folder) / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"xx")
    return folder


def _encoder(folder: Path) -> Path:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=100, **sizes)).save_pretrained(folder)
    return folder


def _encoder_decoder(folder: Path) -> Path:
    config = T5Config(vocab_size=100, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (_adapter, "holds an adapter .* merge it first"),
        (lambda folder: _adapter(_tiny(folder)), "holds an adapter .* or remove adapter_config.json"),
        (_gguf, "is in GGUF"),
        (_quantised("gptq", bits=4, group_size=128), "requires optimum.*use the model's original weights"),
        (_quantised("awq", bits=4), "requires gptqmodel.*use the model's original weights"),
        (_quantised("bitsandbytes", load_in_4bit=True), "requires bitsandbytes.*use the model's original weights"),
        (
            lambda folder: _configure(_tiny(folder), model_type="foonet", auto_map={"AutoConfig": "foo.Foo"}),
            "needs Python code of its own",
        ),
        (lambda folder: _configure(_tiny(folder), model_type="foonet"), "model type `foonet`"),
        (_replace("model.safetensors", b"\x08\x00\x00"), "no model at"),
        (_replace("config.json", b"{"), "not a valid JSON file"),
        (lambda folder: _configure(_tiny(folder), hidden_size="x"), "'hidden_size' expected int"),
        (lambda folder: _configure(_tiny(folder), num_attention_heads=7), "not a multiple"),
        (_pickle, "its weights file is damaged"),
        (_encoder, "is an encoder"),
        (_encoder_decoder, "no causal language model for model type 't5'"),
    ],
    ids=[
        "adapter", "model-and-adapter", "gguf", "gptq", "awq", "bitsandbytes", "custom-code", "unknown-type", "cut-weights",
        "bad-config", "bad-type", "bad-value", "bad-pickle", "encoder", "encoder-decoder",
    ],
)  # fmt: skip
def test_anything_but_a_plain_model_is_refused_in_one_sentence(
    tmp_path: Path, make: Callable[[Path], Path], problem: str
) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        load.load_model(make(tmp_path / "m"), "fp32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq"])
def test_quantised_weights_are_not_trained(tmp_path: Path, method: str) -> None:
    config = load.load_config(str(_quantised(method, bits=4)(tmp_path / "m")))
    with pytest.raises(UserError, match=f"quantised weights \\({method}\\), which cannot be trained"):
        check_trainable(config, "m")


def test_plain_weights_are_trained(tmp_path: Path) -> None:
    check_trainable(load.load_config(str(_tiny(tmp_path / "m"))), "m")


def test_default_attention_is_what_transformers_chooses() -> None:
    names = ["gpt2", "llama", "gemma2", "bloom", "mamba", "gpt_neo", "gpt_oss", "gemma3", "qwen3_5"]
    found = {name: load.default_attn_implementation(AutoConfig.for_model(name)) for name in names}
    with torch.device("meta"):
        sizes = {"num_hidden_layers": 2, "n_layer": 2}
        for name in ["gpt2", "llama", "gemma2", "bloom", "mamba"]:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes))
            assert found[name] == model.config._attn_implementation, name
    assert {name for name, attention in found.items() if attention == "eager"} == {
        "gemma2", "bloom", "mamba", "gpt_neo", "gpt_oss",
    }  # fmt: skip


@pytest.fixture(scope="module")
def wrappers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Return folders of multimodal models with random weights, and the whole models' logits of a text."""
    saved = {}
    for name, values in WRAPPERS.items():
        torch.manual_seed(1)
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **values)).eval()
        folder = tmp_path_factory.mktemp("wrappers") / name
        model.save_pretrained(folder)
        with torch.no_grad():
            saved[name] = folder, model(input_ids=_text()).logits
    return saved


def _text() -> torch.Tensor:
    return torch.arange(12)[None] * 7 % 503


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_text_part_of_a_wrapper_gives_the_wrappers_logits(
    name: str,
    wrappers: dict[str, tuple[Path, torch.Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, expected = wrappers[name]
    config = load.load_config(str(folder))
    assert (config.vocab_size, config.num_hidden_layers) == (503, 2)
    model = load.load_model(folder, "fp32", config=config)
    assert f"is multimodal ({name}): its text part ({config.model_type}) alone" in capsys.readouterr().out
    assert not any("vision" in key for key in model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=_text()).logits, expected, rtol=1e-5, atol=1e-6)
        model.save_pretrained(tmp_path)
        again = load.load_model(tmp_path, "fp32")
        assert type(again) is type(model)
        assert torch.equal(again(input_ids=_text()).logits, model(input_ids=_text()).logits)


def test_a_wrapper_without_some_weights_of_its_text_part_is_refused(
    wrappers: dict[str, tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    weights = load_file(wrappers["gemma3"][0] / "model.safetensors")
    lost = next(
        name for name in weights if name.endswith("layers.1.mlp.up_proj.weight") and "language" in name
    )
    del weights[lost]
    (tmp_path / "config.json").write_bytes((wrappers["gemma3"][0] / "config.json").read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weight the model needs .*\(model.layers.1.mlp.up_proj.weight\)"):
        load.load_model(tmp_path, "fp32")


def test_the_head_of_a_wrapper_is_tied_as_in_the_wrappers_config(tmp_path: Path) -> None:
    """The wrapper's class reads the wrapper's config; with the text config's other setting the head would be lost."""
    values = {**WRAPPERS["gemma3"], "tie_word_embeddings": False}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("gemma3", **values)).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=_text()).logits
        torch.testing.assert_close(load.load_model(tmp_path, "fp32")(input_ids=_text()).logits, expected)
