"""Every kind of checkpoint DeepSpeed writes here -> weights equal, bit for bit, to those of the training processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.export.conftest import BY_NAME, CONVERTIBLE, REPOSITORY
from trainer.export import reference_weights, safetensors_writer
from trainer.export.convert import convert
from trainer.models import architecture
from trainer.settings import ConvertSettings
from trainer.storage import atomic_dir
from trainer.zero import layout
from trainer.zero.checksum_reader import ChecksumReader


def assert_same_bits(left: torch.Tensor, right: torch.Tensor) -> None:
    assert left.dtype == right.dtype and left.shape == right.shape
    assert left.contiguous().view(-1).view(torch.uint8).equal(right.contiguous().view(-1).view(torch.uint8))


def export_of(checkpoints: Path, name: str, tmp_path: Path, **settings: object) -> Path:
    return convert(ConvertSettings(str(checkpoints / name), str(tmp_path / "export"), **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_fp32_export_is_the_master_weights_of_the_training_processes(
    name: str, checkpoints: Path, tmp_path: Path
) -> None:
    export = export_of(checkpoints, name, tmp_path, dtype="fp32")
    masters = load_file(checkpoints / name / "masters.safetensors")
    written = load_file(export / "model.safetensors")
    assert set(written) == set(masters)
    for parameter, expected in masters.items():
        assert_same_bits(written[parameter], expected.float())
    loaded = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).state_dict()
    for parameter, expected in masters.items():
        assert_same_bits(loaded[parameter], expected.float())
    if BY_NAME[name]["model"] == "gpt2":
        assert_same_bits(loaded["lm_head.weight"], loaded["transformer.wte.weight"])
    atomic_dir.verify_digests(export)


# zero_to_fp32.py supports neither stage 0 nor BF16_Optimizer, whose files have no zero_stage.
ZERO_TO_FP32_CASES = [
    name for name in CONVERTIBLE if "2ranks" in name and "zero0" not in name and "accumulation" not in name
]


@pytest.mark.parametrize("name", ZERO_TO_FP32_CASES)
def test_fp32_export_equals_zero_to_fp32(name: str, checkpoints: Path, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    theirs = get_fp32_state_dict_from_zero_checkpoint(
        str(checkpoints / name / "checkpoints"), tag="step-000002"
    )
    ours = load_file(export_of(checkpoints, name, tmp_path, dtype="fp32") / "model.safetensors")
    lost_by_deepspeed = set(ours) - set(theirs)
    case = BY_NAME[name]
    assert bool(lost_by_deepspeed) == (case["stage"] == 1 and bool(case.get("frozen")))  # a bug of DeepSpeed
    for parameter in set(ours) - lost_by_deepspeed:
        assert_same_bits(ours[parameter], theirs[parameter].float())


@pytest.mark.parametrize(
    "name", ["gpt2-zero1-fp32-2ranks", "qwen2-zero3-bf16-2ranks", "gpt2-zero1-bf16-1ranks"]
)
def test_bf16_export_is_the_masters_rounded_to_nearest(name: str, checkpoints: Path, tmp_path: Path) -> None:
    export = export_of(checkpoints, name, tmp_path, dtype="bf16", verify=True)
    written = load_file(export / "model.safetensors")
    for parameter, master in load_file(checkpoints / name / "masters.safetensors").items():
        assert_same_bits(written[parameter], master.to(torch.bfloat16))
    assert json.loads((export / "config.json").read_text())["dtype"] == "bfloat16"


def test_same_dtype_is_the_one_trained_in(checkpoints: Path, tmp_path: Path) -> None:
    export = export_of(checkpoints, "qwen2-zero2-bf16-2ranks", tmp_path)
    assert AutoConfig.from_pretrained(export).dtype == torch.bfloat16
    assert atomic_dir.read_manifest(export)["facts"]["export_dtype"] == "bf16"


@pytest.mark.parametrize("name", ["gpt2-zero1-fp32-2ranks-buffers", "gpt2-zero3-bf16-2ranks-buffers"])
def test_buffers_are_written_in_their_dtype(name: str, checkpoints: Path, tmp_path: Path) -> None:
    case = BY_NAME[name]
    files = layout.open_files(
        checkpoints / name / "checkpoints" / "step-000002", case["stage"], case["world_size"], case["dtype"]
    )
    stored = layout.locate_weights(files)
    (shard,) = safetensors_writer.split_into_shards(stored.tensors, torch.float32, 10**9, {})
    with ChecksumReader() as reader:
        safetensors_writer.write(shard, tmp_path / shard.name, reader, lambda num_bytes: None)
        reader.verify_checksums()
    written = load_file(tmp_path / shard.name)
    masters = load_file(checkpoints / name / "masters.safetensors")
    assert set(written) == set(masters) and written["calibration"].dtype == torch.int64
    for tensor, expected in masters.items():
        assert_same_bits(written[tensor], expected.float() if expected.is_floating_point() else expected)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_reference_weights_are_the_master_weights(name: str, checkpoints: Path) -> None:
    case = BY_NAME[name]
    weights = reference_weights.reference_weights(
        checkpoints / name / "checkpoints" / "step-000002", case["stage"], case["world_size"], case["dtype"]
    )
    masters = load_file(checkpoints / name / "masters.safetensors")
    assert set(weights) == set(masters)
    for parameter, expected in masters.items():
        assert_same_bits(weights[parameter].detach(), expected)


def test_folder_is_laid_out_as_save_pretrained_does(checkpoints: Path, tmp_path: Path) -> None:
    export = export_of(checkpoints, "gpt2-zero3-fp32-2ranks", tmp_path, max_shard_size="6KB")
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="6KB")
    ours, theirs = (
        json.loads((folder / safetensors_writer.INDEX_NAME).read_text())
        for folder in (export, tmp_path / "theirs")
    )
    assert ours["metadata"] == theirs["metadata"]
    assert set(ours["weight_map"]) == set(theirs["weight_map"])
    num_files = len(list(export.glob("*.safetensors")))
    assert num_files > 2 and (export / f"model-00001-of-{num_files:05d}.safetensors").is_file()
    for file in export.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = list(opened.keys())
        assert len(names) == 1 or file.stat().st_size < 6000 + 2000  # the header comes on top
    left, right = (
        json.loads((folder / "config.json").read_text()) for folder in (export, tmp_path / "theirs")
    )
    assert {key: left[key] for key in ("dtype", "architectures")} == {
        key: right[key] for key in ("dtype", "architectures")
    }


def test_folder_has_card_manifest_and_tokenizer(checkpoints: Path, tmp_path: Path) -> None:
    export = export_of(checkpoints, "gpt2-zero2-fp32-2ranks", tmp_path)
    manifest = atomic_dir.read_manifest(export, kind="export")
    assert set(manifest["files"]) == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json",
    }  # fmt: skip
    assert manifest["facts"]["checkpoint"].endswith("checkpoints/step-000002")
    assert manifest["facts"]["method"] == "socratic" and manifest["facts"]["finished"] is True
    card = (export / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "ZeRO stage 2, 2 ranks |" in card
    assert f"{manifest['facts']['num_parameters']:,} parameters" in card
    assert not list(export.parent.glob(".*"))  # no temporary directory is left


def test_recorded_architecture_avoids_the_import_of_transformers(checkpoints: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from trainer.export.convert import convert
from trainer.settings import ConvertSettings
convert(ConvertSettings({str(checkpoints / "qwen2-zero3-bf16-2ranks")!r}, {str(tmp_path / "export")!r}))
assert not {{"transformers", "deepspeed"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
    assert not (tmp_path / "export" / "architecture.json").exists()


@pytest.mark.parametrize("name", ["qwen2-zero3-bf16-2ranks", "gpt2-zero3-bf16-2ranks"])
def test_recorded_architecture_is_that_of_the_class(name: str, checkpoints: Path, checkpoint_copy) -> None:
    folder = checkpoint_copy(name) / "model"
    built = architecture.build_architecture(folder)
    assert architecture.read_architecture(folder) == built
    architecture.record_architecture(folder)
    assert architecture.read_architecture(folder) == built
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    assert architecture.read_architecture(folder) != built  # the record is of another config
