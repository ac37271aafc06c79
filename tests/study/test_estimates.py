"""Estimates of problems, examples and parameters without a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.study.test_status import publish_directory
from trainer.settings import PrepareSettings, TrainSettings
from trainer.study import table
from trainer.study.study_file import Study

MakeStudy = Callable[[dict[str, Any]], Study]
PREPARED = PrepareSettings(tokenizer_name="stories", output_dir="shards/none")
# Parameter counts published with the models.
KNOWN = {
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-xl": 1_557_611_200,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
}


def training(**model: str) -> TrainSettings:
    return TrainSettings(train_shards="shards/none", output_dir="run", **model)


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block the network and use an empty Hub cache."""
    monkeypatch.chdir(tmp_path)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_are_counted(name: str) -> None:
    assert table.num_parameters(training(model_name_or_path=name), PREPARED) == KNOWN[name]


def test_parameters_of_a_preset_a_folder_and_an_unknown_model(tmp_path: Path) -> None:
    from transformers import GPT2Config

    preset = training(config_name="stories-0.2m")
    assert table.num_parameters(preset, PREPARED) == 190_720
    unknown = PrepareSettings(tokenizer_name="org/tokenizer", output_dir="shards/none")
    assert table.num_parameters(preset, unknown) is None, "its vocabulary is not known"

    GPT2Config(vocab_size=100, n_layer=1, n_embd=8, n_head=2, n_positions=16).save_pretrained(
        tmp_path / "mine"
    )
    block = 2 * 2 * 8 + (8 * 24 + 24) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8)
    folder = training(config_name=str(tmp_path / "mine"))
    assert table.num_parameters(folder, PREPARED) == 100 * 8 + 16 * 8 + block + 2 * 8
    assert table.num_parameters(training(model_name_or_path="org/unknown"), PREPARED) is None
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(json.dumps({"model_type": "no such"}))
    assert table.num_parameters(training(config_name=str(tmp_path / "broken")), PREPARED) is None


def test_counts_come_from_shards_or_settings(values: dict[str, Any], make_study: MakeStudy) -> None:
    values["methods"] = ["cot", "iterative_ahead"]
    values["evaluate"] = {"max_problems": 20}
    study = make_study(values)
    train, test = study.prepare_settings
    solver = next(run for run in study.runs if run.train and run.train.method == "solver")
    assert solver.train
    assert (table.num_problems(train), table.num_problems(test)) == (300, 30)
    assert table.num_examples(solver.train, study.prepare_settings) == 300
    assert table.num_answers(study.runs[0].evaluations[0], study.prepare_settings) == 20

    per_method = {"cot": 290, "solver": 280}
    publish_directory(
        Path(train.output_dir), "shards", num_problems=299, problems_per_method=per_method, recipe={}
    )
    assert table.num_problems(train) == 299
    assert table.num_examples(solver.train, study.prepare_settings) == 280
    source = PrepareSettings(
        data="gsm8k", data_path="openai/gsm8k", tokenizer_name="gpt2", output_dir="shards/gsm8k-train"
    )
    assert table.num_problems(source) is None, "only the source knows"
