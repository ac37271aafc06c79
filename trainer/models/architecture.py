"""Names, shapes and dtypes of the tensors that `save_pretrained` writes for a config.json.

The model is built on the meta device (no memory, no random numbers). Its state dict, after transformers' own removal of
tied aliases and reversal of weight conversions, is what `save_pretrained` would write. Training records the result in
architecture.json beside the config, so that an export need not import transformers: on a small machine the import
takes longer than converting a model of 355M parameters.
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
from trainer.models.load import DTYPES
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
    shapes: dict[str, tuple[int, ...]]  # of the model's tensors without tied aliases, in model order
    tied: tuple[str, ...]  # aliases that are not written
    num_parameters: int  # tied ones counted once
    generation_config: str  # JSON, the class's default
    moved: dict[str, StridedView]  # tensors of the files that differ from the model's tensor of that name
    kept: dict[str, dict[str, str]]  # "bf16" -> a model's tensor -> its dtype if not bfloat16, e.g. "float32"
    own_config: str = ""  # JSON of the config to write if the model is the text part of a wrapper, else ""
    text_part_of: str = ""  # model type of the multimodal wrapper whose text part this is, else ""


def read_architecture(folder: Path) -> Architecture:
    """Return the architecture of the config.json in `folder`: recorded if architecture.json matches the config, else built."""
    return _recorded(folder) or build_architecture(folder)


def is_recorded(folder: Path) -> bool:
    """Return whether `read_architecture` needs no transformers."""
    return _recorded(folder) is not None


def record_architecture(folder: Path, text_part_of: str = "") -> None:
    """Write architecture.json beside the config.json in `folder`."""
    built = build_architecture(folder)
    content = {"config_sha256": atomic_dir.file_digest(folder / "config.json"), **vars(built)}
    content["moved"] = {name: view.to_json() for name, view in built.moved.items()}
    content["text_part_of"] = text_part_of or built.text_part_of
    atomic_dir.write_text(folder / ARCHITECTURE_FILE, json.dumps(content) + "\n")


def build_architecture(folder: Path) -> Architecture:
    """Return the architecture of the model that transformers builds on the meta device from `folder`/config.json.

    Raises UserError if transformers cannot build the model or cannot revert its weights' names.
    """
    from transformers import AutoConfig

    from trainer.models import saved_layout

    problem = "transformers cannot build this model"
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            # No class requests float16, so a tensor of another dtype is one whose dtype the class fixes.
            config.dtype = "float16"
            model: Any = load.build_on_meta(config)
        problem = f"the weights of a {type(model).__name__} cannot be exported under the names of the Hub"
        written = saved_layout.deduplicated_state_dict(model)
        moved = saved_layout.trace_saved_tensors(model)
    except Exception as error:  # of many types
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder / 'config.json'}: {problem}: {reason}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in written.items()}
    tied = tuple(name for name in model.state_dict() if name not in shapes)
    generation = "{}" if model.generation_config is None else model.generation_config.to_json_string()
    is_part = type(model.config) is not type(config)
    return Architecture(
        class_name=type(model).__name__,
        shapes=shapes,
        tied=tied,
        num_parameters=model.num_parameters(),
        generation_config=generation,
        moved=moved,
        kept={dtype: _kept(model, written, dtype) for dtype in DTYPES},
        own_config=model.config.to_json_string() if is_part else "",
        text_part_of=config.model_type if is_part else "",
    )


def _kept(model: PreTrainedModel, tensors: dict[str, torch.Tensor], dtype: str) -> dict[str, str]:
    """Return the dtype that `from_pretrained` gives each floating-point tensor that it does not load as `dtype`."""
    import torch
    from transformers.core_model_loading import build_glob_alternation

    wanted = getattr(torch, DTYPES[dtype])
    plan = library_internals.dtype_plan(model, wanted)
    pattern, names, _ = build_glob_alternation(list(plan))
    kept = {}
    for name, tensor in tensors.items():
        found = wanted if tensor.dtype == torch.float16 else tensor.dtype
        if plan and (match := pattern.search(name)):
            found = plan[names[str(match.lastgroup)]]
        if found != wanted and tensor.is_floating_point():
            kept[name] = str(found).removeprefix("torch.")
    return kept


def _recorded(folder: Path) -> Architecture | None:
    """Return the content of architecture.json; None if missing, of another config.json, or of an incompatible version."""
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
