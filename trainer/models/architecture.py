"""Names, shapes and dtypes of the tensors that `save_pretrained` writes for a config.json.

The model is built on the meta device, without weights or random numbers. As in `save_pretrained`, transformers removes tied
aliases from the model's state dict and reverts weight conversions. Training writes the result to architecture.json beside
config.json. An export that reads architecture.json does not import transformers. On a small machine, this import takes
longer than the conversion of a model with 355M parameters.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.models import load
from trainer.models.load import TORCH_DTYPE_NAMES
from trainer.runtime import library_internals
from trainer.storage import atomic_dir

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from trainer.models.saved_layout import StridedView

ARCHITECTURE_FILE = "architecture.json"


@dataclass(frozen=True)
class Architecture:
    """Description of a model's weight files; architecture.json holds the fields under the same names."""

    class_name: str  # e.g. GPT2LMHeadModel
    shapes: dict[str, tuple[int, ...]]  # tensor name -> shape, without tied aliases, in model order
    tied: tuple[str, ...]  # names of tied aliases, which are not in the files
    num_parameters: int  # tied parameters counted once
    generation_config: str  # JSON of the class's default generation config
    # Name in the file -> view of the model's tensors. Only tensors that `save_pretrained` renames or changes are listed.
    moved: dict[str, StridedView]
    # Requested dtype ("bf16") -> {name: dtype ("float32")} of the tensors that `from_pretrained` loads in another dtype.
    kept: dict[str, dict[str, str]]
    own_config: str = ""  # JSON of the text part's config if the model is in a multimodal wrapper, else ""
    text_part_of: str = ""  # model type of the multimodal wrapper that contains the model, else ""


def read_architecture(folder: Path) -> Architecture:
    """Return the recorded architecture, or build it if no architecture.json belongs to `folder`/config.json."""
    return _recorded(folder) or build_architecture(folder)


def is_recorded(folder: Path) -> bool:
    """Return whether architecture.json belongs to config.json. If so, `read_architecture` does not import transformers."""
    return _recorded(folder) is not None


def record_architecture(folder: Path, text_part_of: str = "") -> None:
    """Write `folder`/architecture.json for config.json. A `text_part_of` other than "" replaces that of the built model."""
    built = build_architecture(folder)
    content = {"config_sha256": atomic_dir.file_digest(folder / "config.json"), **vars(built)}
    content["moved"] = {name: view.to_json() for name, view in built.moved.items()}
    content["text_part_of"] = text_part_of or built.text_part_of
    atomic_dir.write_text(folder / ARCHITECTURE_FILE, json.dumps(content) + "\n")


def build_architecture(folder: Path) -> Architecture:
    """Return the architecture of the model that transformers builds on the meta device from `folder`/config.json.

    Raises UserError if transformers cannot build the model or cannot revert its weight conversions.
    """
    from transformers import AutoConfig

    from trainer.models import saved_layout

    problem = "transformers cannot build this model"
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            # No model class fixes the dtype float16. So a built tensor that is not float16 has a dtype that the class fixes.
            config.dtype = "float16"
            model: Any = load.build_on_meta(config)
        problem = f"the weights of a {type(model).__name__} cannot be exported under the names of the Hub"
        tensors = saved_layout.deduplicated_state_dict(model)
        moved = saved_layout.trace_saved_tensors(model)
    except Exception as error:  # transformers raises errors of many types
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder / 'config.json'}: {problem}: {reason}") from None
    is_text_part = type(model.config) is not type(config)
    return Architecture(
        class_name=type(model).__name__,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        tied=tuple(name for name in model.state_dict() if name not in tensors),
        num_parameters=model.num_parameters(),
        generation_config=model.generation_config.to_json_string() if model.generation_config else "{}",
        moved=moved,
        kept={dtype: _kept_dtypes(model, tensors, dtype) for dtype in TORCH_DTYPE_NAMES},
        own_config=model.config.to_json_string() if is_text_part else "",
        text_part_of=config.model_type if is_text_part else "",
    )


def _kept_dtypes(model: PreTrainedModel, tensors: dict[str, torch.Tensor], dtype: str) -> dict[str, str]:
    """Return a dict name -> dtype of the floating-point tensors that `from_pretrained` does not load as `dtype`."""
    import torch
    from transformers.core_model_loading import build_glob_alternation

    requested = getattr(torch, TORCH_DTYPE_NAMES[dtype])
    plan = library_internals.dtype_plan(model, requested)
    pattern, names, _ = build_glob_alternation(list(plan))
    kept = {}
    for name, tensor in tensors.items():
        loaded = requested if tensor.dtype == torch.float16 else tensor.dtype
        if plan and (match := pattern.search(name)):
            loaded = plan[names[str(match.lastgroup)]]
        if loaded != requested and tensor.is_floating_point():
            kept[name] = str(loaded).removeprefix("torch.")
    return kept


def _recorded(folder: Path) -> Architecture | None:
    """Return the content of architecture.json; None if it is missing, incompatible, or belongs to another config.json."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        recorded = json.loads((folder / ARCHITECTURE_FILE).read_text(encoding="utf-8"))
        if recorded.pop("config_sha256") == atomic_dir.file_digest(folder / "config.json"):
            from trainer.models.saved_layout import StridedView

            shapes = {name: tuple(shape) for name, shape in recorded.pop("shapes").items()}
            moved = {name: StridedView.from_json(view) for name, view in recorded.pop("moved").items()}
            return Architecture(shapes=shapes, moved=moved, tied=tuple(recorded.pop("tied")), **recorded)
    return None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Context manager that silences transformers' progress bars and warnings."""
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
