"""Files that an export copies from the pretrained model: tokenizer files, licence, code, generation settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from tests.export.family_export import write_checkpoint
from tests.models.families import family_of
from trainer.export.convert import convert
from trainer.models import base_files, load
from trainer.models.tokenizer import load_tokenizer
from trainer.settings import ConvertSettings
from trainer.training.run_files import write_model_files

_SAMPLING = {"temperature": 0.6, "top_p": 0.9, "do_sample": True}
_LICENCES = ("LICENSE", "NOTICE.txt", "USE_POLICY.md")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pretrained model as on the Hub, with two end tokens."""
    folder = tmp_path / "base"
    tokenizer = load_tokenizer("stories")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=[3, 4], bos_token_id=5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(eos_token_id=[3, 4], bos_token_id=5, **_SAMPLING)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"\x00pieces")
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    (folder / "README.md").write_text("the base model's own card")
    for name in _LICENCES:
        (folder / name).write_text(f"terms of {name}")
    return folder


def export_of(base: Path, tmp_path: Path, tokenizer: Any = None) -> Path:
    """Return the export of an untrained checkpoint of `base`."""
    load_config = load.load_config(str(base))
    write_model_files(tmp_path / "model", str(base), load_config, tokenizer or load_tokenizer("stories"))
    model = load.load_model(base, "fp32")
    checkpoint = write_checkpoint(model, tmp_path / "run/checkpoints/step-000001", "fp32", tmp_path / "model")
    return convert(ConvertSettings(str(checkpoint), verify=True))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_tokenizer_files_of_the_base_are_copied_unchanged(base: Path, tmp_path: Path) -> None:
    export = export_of(base, tmp_path)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "chat_template.jinja",
        *_LICENCES,
    ):
        assert (export / name).read_bytes() == (base / name).read_bytes()
    assert "base model's own card" not in (export / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(export).chat_template == "{{ messages }}\n"


def test_tokenizer_of_the_shards_is_exported(base: Path, tmp_path: Path) -> None:
    """The tokens of the export do not depend on the tokenizer of the base model."""
    tokenizer = load_tokenizer("stories")
    expected = tokenizer("3 boxes")["input_ids"]
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    export = export_of(base, tmp_path, tokenizer)
    assert AutoTokenizer.from_pretrained(export)("3 boxes")["input_ids"] == expected
    assert not (export / "tokenizer.model").exists()  # it belongs to another tokenizer


def test_tokenizer_class_that_changes_the_tokens_is_not_exported(base: Path, tmp_path: Path) -> None:
    """`GPT2Tokenizer` ignores the pre-tokenizer that splits digits."""
    written = Tokenizer(models.BPE({"1": 0, "2": 1, "12": 2, "<e>": 3}, [("1", "2")]))
    written.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    written.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=written, eos_token="<e>").save_pretrained(base)
    change(base / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    tokenizer = load_tokenizer(base)
    assert tokenizer("12")["input_ids"] == [0, 1] != AutoTokenizer.from_pretrained(base)("12")["input_ids"]
    export = export_of(base, tmp_path, tokenizer)
    assert AutoTokenizer.from_pretrained(export)("12")["input_ids"] == [0, 1]
    assert (export / "tokenizer.model").is_file()  # of the same tokenizer


def test_generation_settings_of_the_base(base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("stories")
    written = read(export_of(base, tmp_path) / "generation_config.json")
    assert written["eos_token_id"] == [3, 4, tokenizer.eos_token_id]
    assert written["bos_token_id"] == 5 and written["pad_token_id"] == tokenizer.eos_token_id
    assert {name: written[name] for name in _SAMPLING} == _SAMPLING
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export")
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == written["eos_token_id"]


def test_end_tokens_of_the_config_without_generation_settings(base: Path) -> None:
    tokenizer = load_tokenizer("stories")
    (base / "generation_config.json").unlink()
    assert base_files.generation_config(base, tokenizer)["eos_token_id"] == [3, 4, tokenizer.eos_token_id]
    change(base / "config.json", eos_token_id=tokenizer.eos_token_id)
    assert base_files.generation_config(base, tokenizer)["eos_token_id"] == tokenizer.eos_token_id
    assert base_files.generation_config(None, tokenizer)["eos_token_id"] == tokenizer.eos_token_id


def test_invalid_sampling_settings_of_the_base_are_kept(base: Path) -> None:
    """Llama 2 has a temperature without do_sample, which transformers refuses to save."""
    (base / "generation_config.json").write_text('{"temperature": 0.9, "eos_token_id": 2}')
    found = base_files.generation_config(base, load_tokenizer("stories"))
    assert found["temperature"] == 0.9 and "do_sample" not in found


def test_code_is_copied_but_not_executed(base: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    change(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    change(base / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_mine.Mine"]})
    (base / "modeling_mine.py").write_text(f"open({str(marker)!r}, 'w')\n")
    export = export_of(base, tmp_path)
    assert (export / "modeling_mine.py").read_bytes() == (base / "modeling_mine.py").read_bytes()
    assert read(export / "config.json")["auto_map"] == {"AutoModelForCausalLM": "modeling_mine.Mine"}
    assert "auto_map" not in read(export / "tokenizer_config.json")  # its file is missing
    assert not marker.exists()


def test_auto_map_without_its_code_is_removed(base: Path, tmp_path: Path) -> None:
    change(base / "config.json", auto_map={"AutoConfig": "configuration_mine.Mine"})
    assert "auto_map" not in read(export_of(base, tmp_path) / "config.json")


def test_plain_weights_have_no_quantisation(base: Path, tmp_path: Path) -> None:
    """An old checkpoint, whose config still has the quantisation of the base model."""
    write_model_files(tmp_path / "model", str(base), load.load_config(str(base)), load_tokenizer("stories"))
    (tmp_path / "model" / "architecture.json").unlink()
    change(tmp_path / "model" / "config.json", quantization_config={"quant_method": "fp8"})
    model = load.load_model(base, "fp32")
    checkpoint = write_checkpoint(model, tmp_path / "run/checkpoints/step-000001", "fp32", tmp_path / "model")
    assert "quantization_config" not in read(convert(ConvertSettings(str(checkpoint))) / "config.json")


def test_text_part_of_a_multimodal_model_is_named_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = family_of("gemma3-4b").save(tmp_path / "base")
    export = export_of(base, tmp_path)
    assert "text part alone (of `gemma3`)" in (export / "README.md").read_text()
    assert "the export is the text part of the multimodal model (gemma3)" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(export).config.model_type == "gemma3_text"


def test_files_of_a_hub_name_come_from_the_cache(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "cache" / "models--somebody--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    base.rename(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = base_files.base_folder("somebody/model")
    assert found is not None and (found / "LICENSE").is_file()
    assert base_files.base_folder("somebody/nothing") is None
