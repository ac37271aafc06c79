"""What a Hugging Face folder of a model must hold, asked of the model class itself.

The model is built on the meta device (no memory, no random numbers) from a config.json. Its state dict, after
transformers' own removal of tied aliases, is what `save_pretrained` would write. Training, which has transformers
loaded anyway, records the answer beside the config, so that an export need not import transformers: on a small
machine that takes longer than converting a model of 355M parameters.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer import commit
from trainer.errors import UserError
from trainer.models import load

FILE = "architecture.json"


@dataclass(frozen=True)
class Architecture:
    class_name: str  # e.g. GPT2LMHeadModel
    shapes: dict[str, tuple[int, ...]]  # of what is written, in model order
    tied: tuple[str, ...]  # aliases that are not written
    num_parameters: int  # tied ones counted once
    generation_config: str  # JSON, what the class makes by default


def read(folder: Path) -> Architecture:
    """Architecture of the config.json in `folder`: as recorded, if it was of this very config, or else built."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        recorded = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if recorded.pop("config_sha256") == commit.file_digest(folder / "config.json"):
            shapes = {name: tuple(shape) for name, shape in recorded.pop("shapes").items()}
            return Architecture(shapes=shapes, tied=tuple(recorded.pop("tied")), **recorded)
    return build(folder)


def record(folder: Path) -> None:
    """Write architecture.json beside the config.json in `folder`."""
    digest = commit.file_digest(folder / "config.json")
    commit.write_text(folder / FILE, json.dumps({"config_sha256": digest, **asdict(build(folder))}) + "\n")


def build(folder: Path) -> Architecture:
    """Ask the model class. Raises UserError if transformers cannot build the model."""
    from transformers import AutoConfig
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = load.build_on_meta(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'}: transformers cannot build this model: {error}") from None
    everything = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        everything.pop(name, None)
    written = remove_tied_weights_from_state_dict(dict(everything), model)
    shapes = {name: tuple(tensor.shape) for name, tensor in written.items()}
    tied = tuple(name for name in everything if name not in shapes)
    generation = "{}" if model.generation_config is None else model.generation_config.to_json_string()
    return Architecture(type(model).__name__, shapes, tied, model.num_parameters(), generation)


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
