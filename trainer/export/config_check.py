"""Compare a checkpoint with its config.json, and list the tensors that `save_pretrained` would write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.models import architecture
from trainer.models.architecture import Architecture
from trainer.zero.torch_files import CheckpointTensors, TensorReference

if TYPE_CHECKING:
    from trainer.export.rearrange import RearrangedTensor


@dataclass(frozen=True)
class ExportTensors:
    """Tensors of an export by name, and the dtypes of those that are not written in the export's dtype."""

    expected: Architecture
    tensors: dict[str, TensorReference | RearrangedTensor]
    kept_dtypes: dict[str, str]


def check_against_config(
    stored: CheckpointTensors, checkpoint: Path, folder: Path, dtype: str
) -> ExportTensors:
    """Return the tensors to write for the config.json in `folder`, roughly in storage order.

    `dtype`: "fp32" or "bf16". Raises UserError naming a missing or unexpected parameter, or one of another shape.
    """
    expected = architecture.read_architecture(folder)
    chosen = _select_tensors(stored, checkpoint, folder / "config.json", expected)
    positions = {tensor.ranges: number for number, tensor in enumerate(stored.tensors.values())}
    order = {name: (positions[tensor.ranges], 0) for name, tensor in chosen.items()}
    tensors: dict[str, TensorReference | RearrangedTensor] = dict(chosen)
    kept_dtypes = dict(expected.kept[dtype])
    if expected.moved:
        from trainer.export import rearrange

        for name in set().union(*(view.names for view in expected.moved.values())):
            del tensors[name]
        kept_dtypes = {name: kind for name, kind in kept_dtypes.items() if name in tensors}
        for name, view in expected.moved.items():
            tensors[name] = rearrange.build_tensor(view, chosen)
            order[name] = (positions[chosen[view.first_name].ranges], view.offset)
            if view.first_name in expected.kept[dtype]:
                kept_dtypes[name] = expected.kept[dtype][view.first_name]
    ordered = dict(sorted(tensors.items(), key=lambda item: order[item[0]]))
    return ExportTensors(expected, ordered, kept_dtypes)


def _select_tensors(
    stored: CheckpointTensors, checkpoint: Path, config: Path, expected: Architecture
) -> dict[str, TensorReference]:
    chosen: dict[str, TensorReference] = {}
    for name, shape in expected.shapes.items():
        tensor = stored.find(name)
        if tensor is None:
            raise UserError(
                f"{checkpoint} has no parameter {name}, which the {expected.class_name} of {config} has"
            )
        if tensor.shape != shape:
            raise UserError(f"{checkpoint}: {name} has shape {tensor.shape}, but {config} makes it {shape}")
        chosen[name] = tensor
    used = {tensor.ranges for tensor in chosen.values()}
    for name, tensor in stored.tensors.items():
        if tensor.ranges in used:
            continue
        if name in expected.tied:
            raise UserError(
                f"{checkpoint}: {name} was trained apart from the weight that {config} ties it to; set "
                '"tie_word_embeddings": false there'
            )
        raise UserError(
            f"{checkpoint} holds {name}, which the {expected.class_name} of {config} does not have"
        )
    return chosen


def config_text(folder: Path, expected: Architecture, dtype: str) -> str:
    """Return config.json of the export: the checkpoint's, with the dtype of the files (transformers 5 calls it `dtype`).

    `quantization_config` is removed, and `auto_map` unless its Python files exist in `folder`.
    """
    text = expected.own_config or (folder / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    for name in ("torch_dtype", "quantization_config"):
        config.pop(name, None)
    if not _has_code(config.get("auto_map"), folder):
        config.pop("auto_map", None)
    return _json(config | {"architectures": [expected.class_name], "dtype": dtype})


def tokenizer_config_text(folder: Path) -> str | None:
    """Return tokenizer_config.json without an `auto_map` whose Python files are missing; None if it needs no change."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "auto_map" not in config or _has_code(config.pop("auto_map"), folder):
        return None
    return _json(config)


def generation_config_text(folder: Path, expected: Architecture) -> str:
    """Return generation_config.json: that of the checkpoint, else the model class's default."""
    path = folder / "generation_config.json"
    return _json(
        json.loads(path.read_text(encoding="utf-8") if path.is_file() else expected.generation_config)
    )


def _has_code(auto_map: Any, folder: Path) -> bool:
    """Return whether the files named by `auto_map` exist in `folder` or, "repository--module.Class", in a repository."""
    if not isinstance(auto_map, dict):
        return False
    values = [
        value for entry in auto_map.values() for value in (entry if isinstance(entry, list) else [entry])
    ]
    names = [value.rpartition(".")[0] for value in values if isinstance(value, str)]
    return all("--" in name or (folder / f"{name}.py").is_file() for name in names)


def _json(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
