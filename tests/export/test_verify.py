"""`verify` refuses an export that is not its checkpoint, or not what `save_pretrained` would write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.family_export import give_every_tensor_its_own_numbers, write_checkpoint
from tests.models.families import family_of
from trainer.errors import UserError
from trainer.export.convert import convert
from trainer.export.verify import verify
from trainer.settings import ConvertSettings
from trainer.storage import atomic_dir

Tensors = dict[str, torch.Tensor]


def exported(name: str, tmp_path: Path, dtype: str) -> tuple[Path, Path]:
    model = family_of(name).build()
    give_every_tensor_its_own_numbers(model)
    checkpoint = write_checkpoint(model, tmp_path / "run" / "checkpoints" / "step-000001", dtype)
    return convert(ConvertSettings(str(checkpoint))), checkpoint


def refused(export: Path, checkpoint: Path, pattern: str) -> None:
    facts = atomic_dir.read_manifest(checkpoint)["facts"]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[facts["dtype"]]
    with pytest.raises(UserError, match=pattern):
        verify(export, checkpoint, facts, dtype)


def one_other_element(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.experts.1.up_proj.weight"][3, 5] += 1


def two_experts_changed_places(tensors: Tensors) -> None:
    names = [f"model.layers.1.mlp.experts.{number}.down_proj.weight" for number in (0, 2)]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


def a_tensor_is_missing(tensors: Tensors) -> None:
    del tensors["model.layers.0.self_attn.o_proj.weight"]


def a_kept_tensor_is_rounded(tensors: Tensors) -> None:
    (name,) = [name for name in tensors if name.endswith("layers.1.mlp.gate.weight")]
    assert tensors[name].dtype == torch.float32
    tensors[name] = tensors[name].bfloat16()


def experts_are_fused(tensors: Tensors) -> None:
    names = [f"model.layers.1.mlp.experts.{number}.down_proj.weight" for number in range(4)]
    tensors["model.layers.1.mlp.experts.down_proj"] = torch.stack([tensors.pop(name) for name in names])


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (one_other_element, r"experts.1.up_proj.weight differs from the checkpoint"),
        (two_experts_changed_places, r"experts.0.down_proj.weight differs from the checkpoint"),
        (a_tensor_is_missing, "does not load: .*o_proj"),
        (a_kept_tensor_is_rounded, "gate.weight is bfloat16 .* save_pretrained would write float32"),
        (experts_are_fused, "save_pretrained would not write model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_damaged_export(damage: Callable[[Tensors], None], pattern: str, tmp_path: Path) -> None:
    export, checkpoint = exported("ernie4_5_moe", tmp_path, "bf16")
    tensors = load_file(export / "model.safetensors")
    damage(tensors)
    save_file(tensors, export / "model.safetensors", {"format": "pt"})
    refused(export, checkpoint, pattern)


def test_fault_of_transformers_is_named_as_such(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Youtu's class zeroes the embedding of the padding token whenever it is loaded."""
    export, checkpoint = exported("youtu", tmp_path, "fp32")
    verify(export, checkpoint, atomic_dir.read_manifest(checkpoint)["facts"], torch.float32)
    said = "".join(capsys.readouterr())
    assert "whenever transformers loads model.embed_tokens.weight, it sets 64 elements to 0" in said
