"""Compare a checkpoint with its config.json, and build the tensors and JSON files of the export."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.export.rearrange import RearrangedTensor, build_tensor
from trainer.models import architecture
from trainer.models.architecture import Architecture
from trainer.zero.torch_files import CheckpointTensors, TensorReference


@dataclass(frozen=True)
class ExportTensors:
    """Tensors of an export by name, and the model's architecture (`expected`).

    kept_dtypes: name -> dtype of each floating-point tensor that is not written in the export's dtype.
    """

    expected: Architecture
    tensors: dict[str, TensorReference | RearrangedTensor]
    kept_dtypes: dict[str, str]


def check_against_config(
    stored: CheckpointTensors, checkpoint: Path, folder: Path, dtype: str
) -> ExportTensors:
    """Return the tensors that `save_pretrained` would write for the config.json in `folder`.

    The tensors are roughly in the order of the checkpoint's files. `dtype`: dtype of the export, "fp32" or "bf16". Raises
    UserError if the checkpoint and the config differ in the names or shapes of the parameters.
    """
    expected = architecture.read_architecture(folder)
    parameters = _select_tensors(stored, checkpoint, folder / "config.json", expected)
    positions = {tensor.ranges: number for number, tensor in enumerate(stored.tensors.values())}
    order = {name: (positions[tensor.ranges], 0) for name, tensor in parameters.items()}
    tensors: dict[str, TensorReference | RearrangedTensor] = dict(parameters)
    kept_dtypes = dict(expected.kept[dtype])
    if expected.moved:
        for name in set().union(*(view.names for view in expected.moved.values())):
            del tensors[name]
            kept_dtypes.pop(name, None)
        for name, view in expected.moved.items():
            tensors[name] = build_tensor(view, parameters)
            order[name] = (positions[parameters[view.first_name].ranges], view.offset)
            if view.first_name in expected.kept[dtype]:
                kept_dtypes[name] = expected.kept[dtype][view.first_name]
    ordered = dict(sorted(tensors.items(), key=lambda item: order[item[0]]))
    return ExportTensors(expected, ordered, kept_dtypes)


def _select_tensors(
    stored: CheckpointTensors, checkpoint: Path, config: Path, expected: Architecture
) -> dict[str, TensorReference]:
    parameters: dict[str, TensorReference] = {}
    model = f"the {expected.class_name} of {config}"
    for name, shape in expected.shapes.items():
        tensor = stored.find(name)
        if tensor is None:
            raise UserError(f"{checkpoint} has no parameter {name}, but {model} has it")
        if tensor.shape != shape:
            raise UserError(f"{checkpoint}: {name} has shape {tensor.shape}, but {config} makes it {shape}")
        parameters[name] = tensor
    used = {tensor.ranges for tensor in parameters.values()}
    for name, tensor in stored.tensors.items():
        if tensor.ranges in used:
            continue
        if name in expected.tied:
            raise UserError(
                f"{checkpoint}: {name} was trained apart from the weight that {config} ties it to; set "
                '"tie_word_embeddings": false there'
            )
        raise UserError(f"{checkpoint} holds {name}, but {model} does not have it")
    return parameters


def config_text(folder: Path, expected: Architecture, dtype: str) -> str:
    """Return config.json of the export: the checkpoint's config with `dtype`, the dtype of the export's files.

    `quantization_config` is removed. `auto_map` is removed if a Python file that it names is missing in `folder`.
    """
    config = json.loads(expected.own_config or (folder / "config.json").read_text(encoding="utf-8"))
    for name in ("torch_dtype", "quantization_config"):
        config.pop(name, None)
    if not _has_code(config.get("auto_map"), folder):
        config.pop("auto_map", None)
    return _json(config | {"architectures": [expected.class_name], "dtype": dtype})


def tokenizer_config_text(folder: Path) -> str | None:
    """Return tokenizer_config.json without `auto_map`; None if there is no `auto_map`, or if its code is available."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "auto_map" not in config or _has_code(config.pop("auto_map"), folder):
        return None
    return _json(config)


def generation_config_text(folder: Path, expected: Architecture) -> str:
    """Return generation_config.json from `folder` or, if there is no such file, the default of the model class."""
    path = folder / "generation_config.json"
    text = path.read_text(encoding="utf-8") if path.is_file() else expected.generation_config
    return _json(json.loads(text))


def _has_code(auto_map: Any, folder: Path) -> bool:
    """Return whether all classes in `auto_map` are in files of `folder` or on the Hub ("repository--module.Class")."""
    if not isinstance(auto_map, dict):
        return False
    values = [
        value for entry in auto_map.values() for value in (entry if isinstance(entry, list) else [entry])
    ]
    names = [value.rpartition(".")[0] for value in values if isinstance(value, str)]
    return all("--" in name or (folder / f"{name}.py").is_file() for name in names)


def _json(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
