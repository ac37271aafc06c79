"""`verify` rejects exports that differ from the checkpoint or from the output of `save_pretrained`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.family_export import randomise_tensors, write_checkpoint
from tests.models.families import family_of
from trainer.errors import UserError
from trainer.export.convert import convert
from trainer.export.verify import verify
from trainer.settings import ConvertSettings
from trainer.storage import atomic_dir

Tensors = dict[str, torch.Tensor]


def export_model(name: str, tmp_path: Path, dtype: str) -> tuple[Path, Path]:
    model = family_of(name).build()
    randomise_tensors(model)
    checkpoint = write_checkpoint(model, tmp_path / "run" / "checkpoints" / "step-000001", dtype)
    return convert(ConvertSettings(str(checkpoint))), checkpoint


def check_rejected(export: Path, checkpoint: Path, pattern: str) -> None:
    facts = atomic_dir.read_manifest(checkpoint)["facts"]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[facts["dtype"]]
    with pytest.raises(UserError, match=pattern):
        verify(export, checkpoint, facts, dtype)


def change_one_element(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.experts.1.up_proj.weight"][3, 5] += 1


def swap_two_experts(tensors: Tensors) -> None:
    names = [f"model.layers.1.mlp.experts.{number}.down_proj.weight" for number in (0, 2)]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


def remove_a_tensor(tensors: Tensors) -> None:
    del tensors["model.layers.0.self_attn.o_proj.weight"]


def round_a_kept_tensor(tensors: Tensors) -> None:
    (name,) = [name for name in tensors if name.endswith("layers.1.mlp.gate.weight")]
    assert tensors[name].dtype == torch.float32
    tensors[name] = tensors[name].bfloat16()


def fuse_experts(tensors: Tensors) -> None:
    names = [f"model.layers.1.mlp.experts.{number}.down_proj.weight" for number in range(4)]
    tensors["model.layers.1.mlp.experts.down_proj"] = torch.stack([tensors.pop(name) for name in names])


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (change_one_element, r"experts.1.up_proj.weight differs from the checkpoint"),
        (swap_two_experts, r"experts.0.down_proj.weight differs from the checkpoint"),
        (remove_a_tensor, "does not load: .*o_proj"),
        (round_a_kept_tensor, "gate.weight is bfloat16 .* save_pretrained would write float32"),
        (fuse_experts, "save_pretrained would not write model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_corrupt_export(damage: Callable[[Tensors], None], pattern: str, tmp_path: Path) -> None:
    export, checkpoint = export_model("ernie4_5_moe", tmp_path, "bf16")
    tensors = load_file(export / "model.safetensors")
    damage(tensors)
    save_file(tensors, export / "model.safetensors", {"format": "pt"})
    check_rejected(export, checkpoint, pattern)


def test_bug_of_transformers_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Youtu's class zeroes the embedding of the padding token whenever it is loaded."""
    export, checkpoint = export_model("youtu", tmp_path, "fp32")
    verify(export, checkpoint, atomic_dir.read_manifest(checkpoint)["facts"], torch.float32)
    output = "".join(capsys.readouterr())
    assert "whenever transformers loads model.embed_tokens.weight, it sets 64 elements to 0" in output
