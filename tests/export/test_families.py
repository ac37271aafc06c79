"""Exports of many families have the names, shapes, dtypes and values that `save_pretrained` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tests.export.conftest import BY_NAME, FAMILIES
from tests.export.family_export import assert_same_bits, check_export
from tests.models.families import family_of
from trainer.export.convert import convert
from trainer.models import load
from trainer.settings import ConvertSettings
from trainer.storage import atomic_dir

# Renamed, split, fused and permuted tensors; parameters kept in fp32; text parts of multimodal models; recurrent layers.
RISKY = [
    "gpt_neox", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "deepseek_v4", "glm4_moe", "ernie4_5_moe", "mimo_v2_flash",
    "granitemoe", "jamba", "nemotron_h", "gpt_oss", "lfm2_moe", "gemma3-4b", "qwen3_5", "gemma3n", "minimax", "olmo_hybrid",
    "phimoe", "dbrx", "llama4", "hrm_text", "flint", "kimi_linear", "youtu", "zaya", "aria-text",
]  # fmt: skip


# Parameters kept in fp32, which are not rounded; buffers of integers beside masters without names.
KEPT = ["deepseek_v3", "deepseek_v4", "glm4_moe", "ernie4_5_moe", "mimo_v2_flash", "flint", "nemotron_h"]


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "fp32") for name in RISKY), *((name, "bf16") for name in KEPT)]
)
def test_export_equals_save_pretrained(name: str, dtype: str, tmp_path: Path) -> None:
    check_export(family_of(name).save(tmp_path / "base"), tmp_path, dtype)


@pytest.mark.parametrize("name", FAMILIES)
def test_exports_of_deepspeed_checkpoints_have_the_names_of_the_hub(
    name: str, checkpoints: Path, tmp_path: Path
) -> None:
    """Byte ranges of several ranks are joined; `verify` also passes in the dtype of the training."""
    case = BY_NAME[name]
    export = convert(
        ConvertSettings(str(checkpoints / name), str(tmp_path / "fp32"), dtype="fp32", verify=True)
    )
    masters = load_file(checkpoints / name / "masters.safetensors")
    loaded = load.load_model(export, "fp32").state_dict()
    assert set(masters) <= set(loaded)
    for parameter, expected in masters.items():
        assert_same_bits(loaded[parameter], expected.float(), parameter)
    family_of(case["model"]).save(tmp_path / "base")
    assert _names(export) == _names(tmp_path / "base")
    same = convert(ConvertSettings(str(checkpoints / name), str(tmp_path / "same"), verify=True))
    assert atomic_dir.read_manifest(same)["facts"]["export_dtype"] == case["dtype"]


def _names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())
