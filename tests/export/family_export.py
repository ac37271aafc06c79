"""Convert a checkpoint of any model family, and compare the export with what `save_pretrained` writes.

`check_export(folder, output, dtype)` does it for one model; the table of families calls it for every row.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from trainer.export.convert import convert
from trainer.models import architecture, load
from trainer.settings import ConvertSettings
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory


def check_export(folder: Path, output: Path, dtype: str = "fp32") -> Path:
    """Checkpoint, convert and reload the untrained model in `folder`, and return the export.

    `folder`: a small model saved by `save_pretrained`. `output`: a folder for all files. `dtype`: "fp32" or "bf16". Raises
    AssertionError naming the first tensor that differs from the checkpoint or from the output of `save_pretrained`, and
    UserError if the model is not supported.
    """
    model = load.load_model(folder, "fp32")
    randomise_tensors(model)
    # Loaded again as in training: transformers resets some elements of Zaya.
    model.save_pretrained(output / "noisy")
    model = load.load_model(output / "noisy", "fp32")
    run = RunDirectory(output / f"run-{dtype}")
    checkpoint = write_checkpoint(model, run.checkpoint(1), dtype)
    export = convert(ConvertSettings(str(checkpoint), str(output / f"export-{dtype}"), verify=True))
    published = {name: tensor.shape for name, tensor in _tensors(output / "noisy").items()}
    assert published == {name: tensor.shape for name, tensor in _tensors(export).items()}
    return compare(export, output / f"saved-{dtype}", model, dtype)


def compare(export: Path, saved: Path, model: PreTrainedModel, dtype: str) -> Path:
    """Compare `export` with the fp32 weights of `model`, and with the files that transformers saves after loading it.

    `saved`: folder for these files. Returns `export`. Raises AssertionError.
    """
    # Plain from_pretrained, but for Youtu's padding row; `convert(verify=True)` has loaded with AutoModelForCausalLM.
    reloaded = load.load_model(export, dtype)
    reloaded.save_pretrained(saved)
    ours, expected = _tensors(export), _tensors(saved)
    assert set(ours) == set(expected), f"names differ: {sorted(set(ours) ^ set(expected))[:4]}"
    for name, tensor in ours.items():
        assert_same_bits(tensor, expected[name], name)
    loaded = reloaded.state_dict()
    assert list(loaded) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        wanted = tensor.to(loaded[name].dtype) if tensor.is_floating_point() else tensor
        if dtype == "bf16" and name not in dict(model.named_parameters(remove_duplicate=False)):
            wanted = tensor.to(torch.bfloat16).to(loaded[name].dtype)  # DeepSpeed rounds buffers
        assert_same_bits(loaded[name], wanted, name)
    return export


def assert_same_bits(left: torch.Tensor, right: torch.Tensor, name: str) -> None:
    assert left.dtype == right.dtype and left.shape == right.shape, (
        f"{name}: {left.dtype}{left.shape}, {right.dtype}{right.shape}"
    )
    same = left.contiguous().view(-1).view(torch.uint8).equal(right.contiguous().view(-1).view(torch.uint8))
    assert same, f"{name} has other values"


@torch.no_grad()
def randomise_tensors(model: PreTrainedModel) -> None:
    """Add noise to all weights and saved floating-point buffers, so that no two tensors are equal and none is round."""
    torch.manual_seed(1)
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}  # tied ones once
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor) * 0.01)


def write_checkpoint(
    model: PreTrainedModel, final: Path, dtype: str, model_files: Path | None = None
) -> Path:
    """Write a checkpoint of one rank in DeepSpeed's layout and return `final`: stage 0 for fp32, stage 1 for bf16.

    `model_files`: folder that is copied into the checkpoint as `model`; None for the config alone.
    """
    staging = atomic_dir.create_staging(final)
    state, names = model.state_dict(), {}
    for name, parameter in model.named_parameters():
        names[parameter.data_ptr()] = name
    parameters = dict(model.named_parameters(remove_duplicate=False))
    content = {
        "module": state,
        "buffer_names": [name for name in state if name not in parameters],
        "optimizer": None,
        "dp_world_size": 1,
        "ds_version": "0.19.8",
    }
    if dtype == "bf16":
        low: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
        content["module"] = {
            name: low.setdefault(tensor.data_ptr(), tensor.bfloat16())
            if tensor.is_floating_point()
            else tensor
            for name, tensor in state.items()
        }
        trained = dict(model.named_parameters())
        content["param_shapes"] = [{name: parameter.shape for name, parameter in trained.items()}]
        content["shared_params"] = {
            name: names[parameter.data_ptr()] for name, parameter in parameters.items() if name not in trained
        }
        flat = torch.cat([parameter.detach().flatten() for parameter in trained.values()])
        optimizer = {"single_partition_of_fp32_groups": [flat], "partition_count": [1]}
        name = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer, "ds_version": "0.19.8"}, staging / name)
    torch.save(content, staging / "mp_rank_00_model_states.pt")
    folder = staging / "model"
    if model_files is not None:
        shutil.copytree(model_files, folder)
    else:
        _write_model_files(model, folder)
    facts = {
        "step": 1, "packs_consumed": 1, "world_size": 1, "zero_stage": int(dtype == "bf16"), "dtype": dtype, "method": "socratic",
        "data": "stories", "model_name": model.config.model_type, "seed": 0, "finished": True,
        "num_parameters": model.num_parameters(),
    }  # fmt: skip
    atomic_dir.publish(staging, final, "checkpoint", facts, atomic_dir.digest_files(staging))
    return final


def _write_model_files(model: PreTrainedModel, folder: Path) -> None:
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    architecture.record_architecture(folder)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
