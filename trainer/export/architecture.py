"""What a Hugging Face folder of this model must hold, asked of the model class itself.

The model is built on the meta device (no memory, no random numbers) from the checkpoint's config.json. Its state
dict, after transformers' own removal of tied aliases, is what `save_pretrained` would write.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.export.stored_tensors import StoredModel, StoredTensor


@dataclass(frozen=True)
class Architecture:
    class_name: str  # e.g. GPT2LMHeadModel
    shapes: dict[str, tuple[int, ...]]  # of what is written, in model order
    tied: frozenset[str]  # aliases that are not written
    num_parameters: int  # tied ones counted once
    generation_config: str  # JSON


def read(folder: Path) -> Architecture:
    """Architecture of the config.json in `folder`. Raises UserError if transformers cannot build it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'}: transformers cannot build this model: {error}") from None
    everything = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        everything.pop(name, None)
    written = remove_tied_weights_from_state_dict(dict(everything), model)
    shapes = {name: tuple(tensor.shape) for name, tensor in written.items()}
    tied = frozenset(everything) - frozenset(shapes)
    generation = "{}" if model.generation_config is None else model.generation_config.to_json_string()
    return Architecture(type(model).__name__, shapes, tied, model.num_parameters(), generation)


def fit(stored: StoredModel, checkpoint: Path, folder: Path) -> tuple[Architecture, dict[str, StoredTensor]]:
    """`read` the model and `match` the checkpoint with it."""
    expected = read(folder)
    return expected, match(stored, expected, checkpoint)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no advice from transformers; errors are still raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def match(stored: StoredModel, expected: Architecture, checkpoint: Path) -> dict[str, StoredTensor]:
    """The tensors to write, by name, in the order they are stored.

    Raises UserError naming a parameter that is missing, that is not the model's, or that has another shape.
    """
    config = checkpoint / "model" / "config.json"
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
    used = {piece for tensor in chosen.values() for piece in tensor.pieces}
    for name, tensor in stored.tensors.items():
        if name in expected.tied and not used.issuperset(tensor.pieces):
            raise UserError(
                f"{checkpoint}: {name} was trained apart from the weight that {config} ties it to; set "
                '"tie_word_embeddings": false there'
            )
        if name not in chosen and not used.issuperset(tensor.pieces):
            raise UserError(
                f"{checkpoint} holds {name}, which the {expected.class_name} of {config} does not have"
            )
    place = {piece: number for number, piece in enumerate(_pieces_in_order(stored))}
    return dict(sorted(chosen.items(), key=lambda item: place[item[1].pieces[0]]))


def _pieces_in_order(stored: StoredModel) -> list[Any]:
    return [tensor.pieces[0] for tensor in stored.tensors.values()]


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
