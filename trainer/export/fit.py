"""Does the checkpoint hold the weights that its config.json promises?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.models import architecture
from trainer.models.architecture import Architecture
from trainer.zero.stored_tensors import StoredModel, StoredTensor


def fit(stored: StoredModel, checkpoint: Path, folder: Path) -> tuple[Architecture, dict[str, StoredTensor]]:
    """The architecture of the config.json in `folder`, and the tensors to write, by name, in the order stored.

    Raises UserError naming a parameter that is missing, that is not the model's, or that has another shape.
    """
    expected = architecture.read(folder)
    config = folder / "config.json"
    chosen: dict[str, StoredTensor] = {}
    for name, shape in expected.shapes.items():
        tensor = stored.find(name)
        if tensor is None:
            raise UserError(
                f"{checkpoint} has no parameter {name}, which the {expected.class_name} of {config} has"
            )
        if tensor.shape != shape:
            raise UserError(f"{checkpoint}: {name} has shape {tensor.shape}, but {config} makes it {shape}")
        chosen[name] = tensor
    used = {tensor.pieces for tensor in chosen.values()}
    for name, tensor in stored.tensors.items():
        if tensor.pieces in used:
            continue
        if name in expected.tied:
            raise UserError(
                f"{checkpoint}: {name} was trained apart from the weight that {config} ties it to; set "
                '"tie_word_embeddings": false there'
            )
        raise UserError(
            f"{checkpoint} holds {name}, which the {expected.class_name} of {config} does not have"
        )
    place = {tensor.pieces: number for number, tensor in enumerate(stored.tensors.values())}
    return expected, dict(sorted(chosen.items(), key=lambda item: place[item[1].pieces]))


def config_text(folder: Path, class_name: str, dtype: str) -> str:
    """config.json of the export: the checkpoint's, with the dtype of the file (transformers 5 calls it `dtype`)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    return _json(config | {"architectures": [class_name], "dtype": dtype})


def generation_config_text(folder: Path, expected: Architecture) -> str:
    """generation_config.json: the checkpoint's, or else the one the model class makes."""
    path = folder / "generation_config.json"
    return _json(
        json.loads(path.read_text(encoding="utf-8") if path.is_file() else expected.generation_config)
    )


def _json(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
