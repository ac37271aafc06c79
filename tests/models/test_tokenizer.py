"""Tokenizers are loaded as tokenizer.json defines them, and a pretrained model's must match the shards'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from tests.sentencepiece import save_tokenizer
from trainer.errors import UserError
from trainer.models import load
from trainer.models.tokenizer import (
    check_saved_tokenizer,
    fingerprint,
    load_tokenizer,
    max_text_token_id,
)
from trainer.settings import PrepareSettings
from trainer.shards.model_tokenizer import check_model_fits_shards, check_same_tokens
from trainer.shards.prepare import prepare
from trainer.shards.read import Shards

TEXT = "2023 = 15 apples"


def _digits(shared_data: Path, folder: Path) -> Path:
    """Save GPT-2's tokenizer with single digits in `folder`, under the class name of published ones (SmolLM2)."""
    AutoTokenizer.from_pretrained(shared_data / "gpt2-tokenizer").save_pretrained(folder)
    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text())
    digits = {"type": "Digits", "individual_digits": True}
    rules["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, rules["pre_tokenizer"]]}
    path.write_text(json.dumps(rules))
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "GPT2Tokenizer"
    return folder


def _shards(shared_data: Path, tokenizer: Path, folder: Path) -> Shards:
    values: dict[str, Any] = {
        "data": "gsm8k",
        "data_path": str(shared_data / "gsm8k"),
        "split": "test_socratic",
    }
    return prepare(
        PrepareSettings(**values, tokenizer_name=str(tokenizer), output_dir=str(folder), max_problems=20)
    )


@pytest.fixture(scope="module")
def gpt2_shards(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return _shards(shared_data, shared_data / "gpt2-tokenizer", tmp_path_factory.mktemp("gpt2") / "s")


def test_a_step_that_transformers_drops_is_kept(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _digits(shared_data, tmp_path / "t")
    written = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert (
        AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] != written
    )  # transformers still has the error
    tokenizer = load_tokenizer(folder)
    assert tokenizer(TEXT)["input_ids"] == written
    printed = capsys.readouterr().out
    assert (
        "tokenizer.json is used unchanged; transformers' GPT2Tokenizer would change its pre-tokenizer"
        in printed
    )
    tokenizer.save_pretrained(tmp_path / "again")
    assert fingerprint(load_tokenizer(tmp_path / "again")) == fingerprint(tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(TEXT)["input_ids"] == written


def test_a_tokenizer_beside_a_qwen2_config_is_read_from_its_file(shared_data: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(shared_data / "gpt2-tokenizer").save_pretrained(tmp_path)
    AutoConfig.for_model("qwen2").save_pretrained(tmp_path)
    written = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids
    assert (
        AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"] != written
    )  # transformers still has the error
    assert load_tokenizer(tmp_path)(TEXT)["input_ids"] == written


@pytest.mark.parametrize("kind", ["always", "first"])
def test_equivalent_steps_of_another_form_change_nothing(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tokenizer(kind, ["Some apples and 12 pears", "more of 3 apples"], tmp_path)
    tokenizer = load_tokenizer(folder)
    assert type(tokenizer).__name__ == "LlamaTokenizer"
    assert "as its tokenizer.json" not in capsys.readouterr().out
    written = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert tokenizer(TEXT)["input_ids"] == written


def test_llama_2_puts_a_space_before_a_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its file says so, as SentencePiece does; the class of transformers leaves it out."""
    folder = save_tokenizer("legacy", ["Some apples and 12 pears", "more of 3 apples"], tmp_path)
    written = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(" and 12").ids
    assert (
        AutoTokenizer.from_pretrained(folder)(" and 12")["input_ids"] != written
    )  # transformers still has the error
    assert load_tokenizer(folder)(" and 12")["input_ids"] == written
    assert "LlamaTokenizer would change its normalizer" in capsys.readouterr().out


def test_gpt2_is_loaded_without_output(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert type(load_tokenizer(shared_data / "gpt2-tokenizer")).__name__ == "GPT2Tokenizer"
    assert capsys.readouterr().out == ""


def test_a_model_type_with_a_fixed_tokenizer_class_refuses_others(shared_data: Path) -> None:
    """transformers would load another tokenizer from the export than the shards'."""
    tokenizer = load_tokenizer(shared_data / "gpt2-tokenizer")
    with pytest.raises(UserError, match="beside a qwen2 config as Qwen2Tokenizer, which gives other tokens"):
        check_saved_tokenizer(AutoConfig.for_model("qwen2"), tokenizer)
    for model_type in ("llama", "phi3", "jamba", "gemma3_text"):
        check_saved_tokenizer(AutoConfig.for_model(model_type), tokenizer)


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="is in GGUF"):
        load_tokenizer(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"no tokenizer at .*bad") as caught:
        load_tokenizer(tmp_path / "bad")
    assert "\n" not in str(caught.value)


def test_shards_of_another_tokenizer_are_refused_before_the_model_is_built(
    shared_data: Path, tmp_path: Path, gpt2_shards: Shards
) -> None:
    folder = _digits(shared_data, tmp_path / "m")
    tokenizer = load_tokenizer(gpt2_shards.tokenizer_path)
    with pytest.raises(UserError, match=r"was not made with the tokenizer of .*; prepare the shards with"):
        check_same_tokens(str(folder), gpt2_shards, tokenizer)
    ours = _shards(shared_data, folder, tmp_path / "s")
    check_same_tokens(str(folder), ours, load_tokenizer(ours.tokenizer_path))


def test_a_model_without_a_tokenizer_is_reported(
    tmp_path: Path, gpt2_shards: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    check_same_tokens(str(tmp_path), gpt2_shards, load_tokenizer(gpt2_shards.tokenizer_path))
    assert "the shards' tokens could not be compared with the model's: " in capsys.readouterr().out


def test_another_end_token_is_reported(
    shared_data: Path, tmp_path: Path, gpt2_shards: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    own = AutoTokenizer.from_pretrained(shared_data / "gpt2-tokenizer", eos_token="!")
    own.save_pretrained(tmp_path)
    capsys.readouterr()
    check_same_tokens(str(tmp_path), gpt2_shards, load_tokenizer(gpt2_shards.tokenizer_path))
    assert "ends texts with '!', the shards with '<|endoftext|>'" in capsys.readouterr().out


def test_vocabulary_check_uses_the_tokens_of_texts(shared_data: Path, tmp_path: Path) -> None:
    """Gemma 3's tokenizer has an image token without an embedding, which no text contains."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "gpt2-tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert len(tokenizer) == 50258 and max_text_token_id(tokenizer) == 50256
    tokenizer.save_pretrained(tmp_path / "t")
    shards = _shards(shared_data, tmp_path / "t", tmp_path / "s")
    assert shards.max_token_id == int(shards.tokens.max()) == 50256
    config = AutoConfig.for_model("gpt2", vocab_size=50257)
    load.check_vocabulary(config, shards.max_token_id, "m")
    load.check_vocabulary(config, max_text_token_id(tokenizer), "m")
    config.vocab_size = 50256
    with pytest.raises(UserError, match="m has 50256 embeddings but token 50256 occurs"):
        load.check_vocabulary(config, shards.max_token_id, "m")


def test_quantised_weights_are_refused_before_a_model_is_built(gpt2_shards: Shards) -> None:
    config = AutoConfig.for_model("gpt2", quantization_config={"quant_method": "gptq", "bits": 4})
    tokenizer = load_tokenizer(gpt2_shards.tokenizer_path)
    with pytest.raises(UserError, match="quantised weights"):
        check_model_fits_shards(config, "m", gpt2_shards, tokenizer, pretrained=True)


def test_the_stories_tokenizer_is_compiled() -> None:
    assert type(load_tokenizer("stories")) is PreTrainedTokenizerFast
