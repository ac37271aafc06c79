"""Configs get the transformers 4 names of rotary settings and numbers of experts, without a change of meaning."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from trainer.models.base_files import add_old_settings

_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "old"),
    [
        ("gpt_neox", {"rotary_emb_base": 12345, "rotary_pct": 0.5}),
        ("mixtral", {"rope_theta": 5e5}),
        ("llama", {"rope_theta": 5e5, "rope_scaling": _LLAMA3}),
        ("phi", {"rope_theta": 5e4, "partial_rotary_factor": 0.4}),
        ("gemma3_text", {"rope_theta": 777777.0, "rope_local_base_freq": 1234.0}),
        ("qwen3_moe", {"rope_theta": 5e5, "num_experts": 7}),
    ],
)
def test_settings_are_derived(model_type: str, old: dict[str, Any], tmp_path: Path) -> None:
    before = AutoConfig.for_model(model_type, **copy.deepcopy(old))  # for_model changes its arguments
    before.save_pretrained(tmp_path)
    assert not set(old) <= set(json.loads((tmp_path / "config.json").read_text()))
    add_old_settings(tmp_path / "config.json", {})
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written.get(name) for name in old} == old
    read = AutoConfig.from_pretrained(tmp_path)
    for name in ("rope_parameters", "num_local_experts"):
        assert getattr(read, name, None) == getattr(before, name, None)


def test_settings_of_the_base_are_kept_unchanged(tmp_path: Path) -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    published = {
        "rope_theta": 5e4,
        "original_max_position_embeddings": 4096,
        "rope_scaling": scaling,
        "embd_pdrop": 0.0,
    }
    config = AutoConfig.for_model("phi3", **copy.deepcopy(published))
    config.save_pretrained(tmp_path)
    add_old_settings(tmp_path / "config.json", published)
    assert json.loads((tmp_path / "config.json").read_text())["rope_scaling"] == scaling


def test_settings_of_the_base_that_were_overridden_are_not_kept(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", rope_theta=300.0).save_pretrained(tmp_path)
    add_old_settings(tmp_path / "config.json", {"rope_theta": 5e5, "rope_scaling": _LLAMA3})
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == 300.0 and "rope_scaling" not in written


def test_other_configs_are_unchanged(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    add_old_settings(tmp_path / "config.json", {})
    assert json.loads((tmp_path / "config.json").read_text()) == before
