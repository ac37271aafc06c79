"""Load an export with transformers, and compare it with its checkpoint and with the output of `save_pretrained`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from trainer.errors import UserError
from trainer.export import reference_weights
from trainer.models import saved_layout
from trainer.models.architecture import quiet_transformers
from trainer.runtime import library_internals, terminal
from trainer.storage.manifest import CheckpointFacts

_NUM_TOKENS = 32


class VerificationResult(NamedTuple):
    num_tensors: int  # number of compared tensors
    max_logit_difference: float  # maximum absolute difference between logits, computed in fp32


def verify(export: Path, checkpoint: Path, facts: CheckpointFacts, dtype: torch.dtype) -> VerificationResult:
    """Load `export` with `from_pretrained` and compare it with the reference weights of `checkpoint`.

    Every loaded tensor must have the bits of the checkpoint's tensor, rounded to `dtype` (or to fp32 if the model class
    keeps this tensor in fp32). If transformers sets elements to a constant while loading, only a warning is shown. The
    tensors in the files must have the names, shapes, dtypes and bits that `save_pretrained` of the loaded model would write.
    Logits are computed in fp32 from the export and from the unrounded weights. The two results are equal for an fp32 export
    and differ by the rounding error for a bf16 export. Memory: up to four times the model's size. Raises UserError if the
    export does not load or a tensor differs. The message names the first such tensor.
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
    if problems := {name: value for name, value in report.items() if value}:
        raise UserError(f"{export} does not load: {problems}")
    # After this call, `saved_state_dict` uses the names of the model class instead of the names in the loaded files.
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
            loaded[name].copy_(expected)  # so that `saved_state_dict` returns the checkpoint's values
    _compare_values(export, checkpoint, saved_layout.saved_state_dict(model))
    for name, values in changed.items():
        fault = f"a bug of {type(model).__name__}; the files have the values of {checkpoint}"
        if len(values.unique()) != 1:
            raise UserError(f"{export}: transformers loads {name} with other values, {fault}")
        change = f"sets {len(values)} elements to {values[0].item():g}"
        terminal.warning(f"whenever transformers loads {name}, it {change}: {fault}")
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
    """Raise UserError if names, shapes or dtypes in the files differ from `saved`, which `save_pretrained` would write."""
    missing = dict(saved)
    for path, name, written in _tensors(export):
        expected = missing.pop(name, None)
        if expected is None:
            raise UserError(f"{path}: save_pretrained would not write {name}")
        if written.dtype != expected.dtype or written.shape != expected.shape:
            texts = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (written, expected)]
            raise UserError(f"{path}: {name} is {texts[0]}, but save_pretrained would write {texts[1]}")
    if missing:
        raise UserError(f"{export} has no {min(missing)}, which save_pretrained would write")


def _compare_values(export: Path, checkpoint: Path, saved: dict[str, torch.Tensor]) -> None:
    """Raise UserError unless the files' tensors equal `saved`, the checkpoint's weights as `save_pretrained` writes them."""
    for path, name, written in _tensors(export):
        if not _same_bits(written, saved[name]):
            raise UserError(f"{path}: {name} differs from the checkpoint {checkpoint}")


def _tensors(export: Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    for path in sorted(export.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in tuple(file.keys()):
                yield path, name, file.get_tensor(name)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bytes. NaNs with equal bits are equal. 0.0 and -0.0 differ."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    left_bytes, right_bytes = (t.detach().flatten().contiguous().view(torch.uint8) for t in (left, right))
    return torch.equal(left_bytes, right_bytes)
