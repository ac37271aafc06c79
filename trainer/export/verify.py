"""Load an export with transformers, and compare it with its checkpoint and with the output of `save_pretrained`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trainer.errors import UserError
from trainer.export import reference_weights
from trainer.models import saved_layout
from trainer.models.architecture import quiet_transformers
from trainer.runtime import library_internals, terminal

_NUM_TOKENS = 32


@dataclass(frozen=True)
class VerificationResult:
    num_tensors: int  # compared bit for bit
    max_logit_difference: float  # between the export and the checkpoint's own weights, both computed in fp32


def verify(export: Path, checkpoint: Path, facts: dict[str, Any], dtype: torch.dtype) -> VerificationResult:
    """Load `export` with `from_pretrained` and compare it with the reference weights of `checkpoint`.

    Every tensor must equal the stored one bit for bit after rounding to `dtype` (to fp32 where the family keeps that), and
    the files must have the names, shapes, dtypes and bits that `save_pretrained` of the loaded model would write. Logits
    are computed in fp32 from the export and from the unrounded weights; their difference is 0 for an fp32 export, the
    rounding error for bf16. Memory: up to four times the model. Raises UserError naming the first tensor that differs.
    """
    from transformers import AutoModelForCausalLM

    stored = reference_weights.reference_weights(
        checkpoint, facts["zero_stage"], facts["world_size"], facts["dtype"]
    )
    with quiet_transformers():
        reloaded: Any = AutoModelForCausalLM.from_pretrained(
            export, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    model, report = reloaded
    problems = {name: found for name, found in report.items() if found}
    if problems:
        raise UserError(f"{export} does not load: {problems}")
    # Names must be those of the class: transformers would write fused experts again if it had read them.
    library_internals.forget_weight_conversions(model)
    _compare_names(export, saved_layout.saved_state_dict(model))
    loaded = model.state_dict()
    changed = {}
    for name, tensor in stored.items():
        if name not in loaded:
            raise UserError(f"{export}: {name} of the checkpoint is not in the reloaded model")
        expected = tensor.to(loaded[name].dtype) if tensor.is_floating_point() else tensor
        if not _same_bits(loaded[name], expected):
            changed[name] = loaded[name][loaded[name] != expected]
            loaded[name].copy_(expected)  # so that save_pretrained would write the checkpoint's values
    _compare_values(export, checkpoint, saved_layout.saved_state_dict(model))
    for name, values in changed.items():
        fault = f"a bug of {type(model).__name__}; the files have the values of {checkpoint}"
        if len(values.unique()) != 1:
            raise UserError(f"{export}: transformers loads {name} with other values, {fault}")
        terminal.warning(
            f"whenever transformers loads {name}, it sets {len(values)} elements to {values[0].item():g}: {fault}"
        )
    tied = set(loaded) - set(stored)
    model = model.float().eval()
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or _NUM_TOKENS
    tokens = (torch.arange(min(limit, _NUM_TOKENS)) * 7919 % config.vocab_size)[None]
    with torch.no_grad():
        export_logits = model(input_ids=tokens, use_cache=False).logits
        keys = model.load_state_dict({name: t.detach() for name, t in stored.items()}, strict=False)
        if set(keys.missing_keys) - tied or keys.unexpected_keys:
            raise UserError(f"{checkpoint} does not load into the model of {export}: {keys}")
        checkpoint_logits = model(input_ids=tokens, use_cache=False).logits
    return VerificationResult(len(stored), (export_logits - checkpoint_logits).abs().max().item())


def _compare_names(export: Path, saved: dict[str, torch.Tensor]) -> None:
    """Compare names, shapes and dtypes in the files with those of `save_pretrained`. Raises UserError naming a difference."""
    missing = dict(saved)
    for path, name, written in _tensors(export):
        expected = missing.pop(name, None)
        if expected is None:
            raise UserError(f"{path}: save_pretrained would not write {name}")
        if written.dtype != expected.dtype or written.shape != expected.shape:
            raise UserError(
                f"{path}: {name} is {_dtype_and_shape(written)}, but save_pretrained would write {_dtype_and_shape(expected)}"
            )
    if missing:
        raise UserError(f"{export} has no {min(missing)}, which save_pretrained would write")


def _compare_values(export: Path, checkpoint: Path, saved: dict[str, torch.Tensor]) -> None:
    """Compare the files bit for bit with `save_pretrained` of the checkpoint's weights. Raises UserError naming a difference."""
    for path, name, written in _tensors(export):
        if not _same_bits(written, saved[name]):
            raise UserError(f"{path}: {name} differs from the checkpoint {checkpoint}")


def _tensors(export: Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    for path in sorted(export.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in tuple(file.keys()):
                yield path, name, file.get_tensor(name)


def _dtype_and_shape(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether all bytes are equal: NaN equals NaN, and 0.0 differs from -0.0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(
        left.detach().contiguous().view(-1).view(torch.uint8),
        right.detach().contiguous().view(-1).view(torch.uint8),
    )
