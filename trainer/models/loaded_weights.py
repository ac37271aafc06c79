"""Check that a model's files hold the weights that the model needs, and report those it does not use."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.models.text_part import is_wrapper
from trainer.runtime import library_internals, terminal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_NUM_NAMED = 3


def check_weights(model: PreTrainedModel, info: dict[str, Any], name: str, written: PreTrainedConfig) -> None:
    """Raise UserError for missing weights and weights of another shape; report unexpected ones in one line on rank 0.

    `info`: the loading info of `from_pretrained`, from which transformers has removed tied weights and those that a
    family computes. `written`: the config of the folder, for a wrapper the whole.
    """
    problems = []
    if missing := sorted(info["missing_keys"]):
        problems.append(
            f"{_count(missing)} the model needs {_are(missing)} not in its files ({_some(missing)})"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        shapes = [
            f"{key}: {list(in_file)} in the file, {list(in_model)} in the model"
            for key, in_file, in_model in mismatched
        ]
        problems.append(
            f"{_count(shapes)} {_have(shapes)} another shape than the config says ({_some(shapes)})"
        )
    unexpected = sorted(info["unexpected_keys"] or _unexpected_under_zero3(model, name))
    if problems:
        held = f"; its files hold {_some(unexpected)} instead" if unexpected and missing else ""
        raise UserError(
            f"{name}: {' and '.join(problems)}{held}. transformers would fill them with random numbers: "
            "give a complete model whose config.json matches its weights"
        )
    if is_wrapper(written):
        terminal.info(
            f"{name} is multimodal ({written.model_type}): its text part ({model.config.model_type}) alone is used and exported"
            + (f"; {_count(unexpected)} of the other parts are left out" if unexpected else "")
        )
    elif unexpected:
        terminal.warning(
            f"{name} holds {_count(unexpected)} the model does not use ({_some(unexpected)}): left out"
        )


def _unexpected_under_zero3(model: PreTrainedModel, name: str) -> set[str]:
    """Return the weights in a local folder's files that the model lacks, which transformers does not report under ZeRO-3."""
    from transformers.core_model_loading import WeightConverter, rename_source_key
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.utils.loading_report import LoadStateDictInfo

    if not is_deepspeed_zero3_enabled():
        return set()
    changes = library_internals.weight_conversions(model)
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings = [change for change in changes if not isinstance(change, WeightConverter)]
    ours = model.state_dict()
    renamed = (
        rename_source_key(key, renamings, converters, model.base_model_prefix, ours)[0]
        for key in _names_in_files(Path(name))
    )
    found = LoadStateDictInfo(set(), {key for key in renamed if key not in ours}, set(), [], {}, set())
    library_internals.leave_out_expected_extras(model, found)
    return found.unexpected_keys


def _names_in_files(folder: Path) -> set[str]:
    """Return the names of the weights in the safetensors files that transformers loads from `folder`."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", "pt") as file:
            return set(file.keys())
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    return set()


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    rest = len(shown) - _NUM_NAMED
    return ", ".join(shown[:_NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _count(names: list[str]) -> str:
    return f"{len(names)} weight{'s' if len(names) != 1 else ''}"


def _are(names: list[str]) -> str:
    return "are" if len(names) != 1 else "is"


def _have(names: list[str]) -> str:
    return "have" if len(names) != 1 else "has"
