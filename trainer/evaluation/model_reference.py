"""Models under evaluation: find, check and load an export, a checkpoint or any causal LM."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.models import load
from trainer.models.tokenizer import fingerprint, load_tokenizer
from trainer.runtime import distributed
from trainer.settings import ConvertSettings
from trainer.shards.read import Shards
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DIGESTED_PATTERNS = ("*.safetensors", "*.json", "*.bin", "*.model", "*.txt")


@dataclass(frozen=True)
class ModelReference:
    """A model on disk or on the Hub. `facts`: those of its manifest, {} without one."""

    name: str
    kind: str  # "export", "checkpoint" or "model"
    facts: dict[str, Any]

    @property
    def method(self) -> str | None:
        return self.facts.get("method")

    @property
    def run(self) -> RunDirectory | None:
        """The run directory of an export or checkpoint, None outside of one."""
        path = Path(self.name).absolute()
        if self.kind == "export" and RunDirectory(path.parent).export == path:
            return RunDirectory(path.parent)
        if self.kind == "checkpoint" and RunDirectory(path.parent.parent).checkpoints == path.parent:
            return RunDirectory(path.parent.parent)
        return None


def find_model(name_or_path: str) -> ModelReference:
    """Return the model that `name_or_path` names; a run directory stands for its export.

    Raises UserError for an unfinished directory.
    """
    path = Path(name_or_path)
    run = RunDirectory(path)
    if not atomic_dir.is_complete(path) and (atomic_dir.is_complete(run.export) or run.settings.is_file()):
        path = run.export
    if atomic_dir.is_complete(path) or path.name == run.export.name:
        manifest = atomic_dir.read_manifest(path)
        if manifest["kind"] not in ("export", "checkpoint"):
            raise UserError(f"{path} holds {manifest['kind']}; expected an export, a checkpoint or a model")
        return ModelReference(str(path), manifest["kind"], manifest["facts"])
    return ModelReference(name_or_path, "model", {})


def content_digest(reference: ModelReference) -> str:
    """Return the content hash: manifest digest (export, checkpoint), file digests (local model), commit hash (Hub model)."""
    folder = Path(reference.name)
    if reference.kind != "model":
        return atomic_dir.manifest_digest(folder)
    hasher = hashlib.sha256()
    if not folder.is_dir():
        revision = getattr(load.load_config(reference.name), "_commit_hash", None)
        hasher.update(f"{reference.name}@{revision}".encode())
        return hasher.hexdigest()
    for path in sorted({path for pattern in _DIGESTED_PATTERNS for path in folder.glob(pattern)}):
        hasher.update(f"{path.name} {atomic_dir.file_digest(path)}\n".encode())
    return hasher.hexdigest()


def check_models(references: Mapping[str, ModelReference], shards: Shards, allow_unfinished: bool) -> None:
    """Raise UserError for models of different tokenizers, of another one than the shards, or of unfinished training."""
    recorded = [
        (f"the {role} {reference.name}", reference.facts["tokenizer_fingerprint"])
        for role, reference in references.items()
        if reference.facts.get("tokenizer_fingerprint")
    ]
    for (first, fingerprint_1), (other, fingerprint_2) in itertools.pairwise(recorded):
        if fingerprint_1 != fingerprint_2:
            raise UserError(
                f"{first} and {other} have different tokenizers, but each reads the other's tokens; train both on the same "
                "shards"
            )
    for reference in references.values():
        facts = reference.facts
        if facts.get("tokenizer_fingerprint") not in (None, shards.facts["tokenizer_fingerprint"]):
            raise UserError(_other_tokenizer(reference, shards))
        if facts.get("finished") is False and not allow_unfinished:
            raise UserError(
                f"{reference.name} is of a run that stopped at step {facts.get('step')} before its end; "
                "finish the training, or give --allow_unfinished"
            )


def load_model_and_tokenizer(
    reference: ModelReference, shards: Shards, dtype: str, scratch: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model on this rank's device, and its tokenizer; `convert_checkpoint` must have run on rank 0.

    Raises UserError for corrupt files, and for a tokenizer other than that of the shards.
    """
    folder = scratch / "export" if reference.kind == "checkpoint" else Path(reference.name)
    if reference.kind == "export" and distributed.is_main_process():
        atomic_dir.verify_digests(folder)  # once for all ranks
    name = reference.name if reference.kind == "model" else str(folder)
    load.load_config(name)  # raises first if the folder has no model
    tokenizer = load_tokenizer(name)
    if fingerprint(tokenizer) != shards.facts["tokenizer_fingerprint"]:
        raise UserError(_other_tokenizer(reference, shards))
    model = load.load_model(name, dtype)
    load.check_vocabulary(model.config, shards.max_token_id, name)
    model.to(device=load.device())  # type: ignore[call-arg]
    return model, tokenizer


def convert_checkpoint(reference: ModelReference, scratch: Path) -> None:
    """On rank 0, export a checkpoint into `scratch`, which all ranks must be able to read."""
    from trainer.export.convert import convert

    if reference.kind == "checkpoint" and distributed.is_main_process():
        convert(ConvertSettings(checkpoint_dir=reference.name, output_dir=str(scratch / "export")))


def _other_tokenizer(reference: ModelReference, shards: Shards) -> str:
    return (
        f"{reference.name} was not trained with the tokenizer of {shards.path}, so their token ids differ; prepare the test "
        "shards with the model's tokenizer"
    )
