"""Find, check and load the models of an evaluation: exports, checkpoints or any causal LMs."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.export.convert import convert
from trainer.models import load
from trainer.models.source import check_local, check_source
from trainer.models.tokenizer import fingerprint, load_tokenizer
from trainer.runtime import distributed
from trainer.settings import ConvertSettings
from trainer.shards.read import Shards
from trainer.storage import atomic_dir
from trainer.storage.manifest import ExportFacts
from trainer.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DIGESTED_PATTERNS = ("*.safetensors", "*.json", "*.bin", "*.model", "*.txt")


@dataclass(frozen=True)
class ModelReference:
    """A model on disk or on the Hub. `facts`: the facts in the model's manifest; {} if there is no manifest."""

    name: str
    kind: str  # "export", "checkpoint", or "model" (a local folder or Hub name without a manifest)
    facts: ExportFacts | dict[str, Any]

    @property
    def method(self) -> str | None:
        return self.facts.get("method")

    @property
    def run_directory(self) -> RunDirectory | None:
        """The run directory that contains the export or checkpoint; None if there is no such directory."""
        path = Path(self.name).absolute()
        run = RunDirectory(path.parent if self.kind == "export" else path.parent.parent)
        is_inside = {"export": run.export == path, "checkpoint": run.checkpoints == path.parent}
        return run if is_inside.get(self.kind) else None


def find_model(name_or_path: str) -> ModelReference:
    """Return a reference to the model at `name_or_path`. For a run directory, this model is the run's export.

    Raises UserError if a local path or the export of a run is missing, or if a directory is unfinished or has no model.
    """
    path = Path(name_or_path)
    run = RunDirectory(path)
    if not atomic_dir.is_complete(path) and (atomic_dir.is_complete(run.export) or run.settings.is_file()):
        path = run.export
        if not path.exists():
            raise UserError(f"{run.path} has no export; make it with: tools/convert_checkpoint.py {run.path}")
    if atomic_dir.is_complete(path) or path.name == run.export.name:
        manifest = atomic_dir.read_manifest(path)
        if manifest["kind"] not in ("export", "checkpoint"):
            raise UserError(f"{path} holds {manifest['kind']}; expected an export, a checkpoint or a model")
        return ModelReference(str(path), manifest["kind"], manifest["facts"])
    check_local(name_or_path)
    if path.is_dir():  # not for a Hub name: load_config checks it later, with a request
        check_source(name_or_path)
    return ModelReference(name_or_path, "model", {})


def content_digest(reference: ModelReference) -> str:
    """Return a SHA-256 of the manifest (export, checkpoint), of the files (local model), or of name and commit (Hub model)."""
    folder = Path(reference.name)
    if reference.kind != "model":
        return atomic_dir.manifest_digest(folder)
    if folder.is_dir():
        paths = sorted({path for pattern in _DIGESTED_PATTERNS for path in folder.glob(pattern)})
        content = "".join(f"{path.name} {atomic_dir.file_digest(path)}\n" for path in paths)
    else:
        content = f"{reference.name}@{getattr(load.load_config(reference.name), '_commit_hash', None)}"
    return hashlib.sha256(content.encode()).hexdigest()


def check_models(
    models_by_role: Mapping[str, ModelReference], shards: Shards, allow_unfinished: bool
) -> None:
    """Raise UserError if the recorded tokenizers of models and shards differ, or if a model's training is unfinished.

    If `allow_unfinished` is true, an unfinished training is not an error.
    """
    recorded = [
        (f"the {role} {reference.name}", reference.facts["tokenizer_fingerprint"])
        for role, reference in models_by_role.items()
        if reference.facts.get("tokenizer_fingerprint")
    ]
    for (first, fingerprint_1), (other, fingerprint_2) in itertools.pairwise(recorded):
        if fingerprint_1 != fingerprint_2:
            raise UserError(
                f"{first} and {other} have different tokenizers, but each reads the other's tokens; train both on the same "
                "shards"
            )
    for reference in models_by_role.values():
        facts = reference.facts
        if facts.get("tokenizer_fingerprint") not in (None, shards.facts["tokenizer_fingerprint"]):
            raise UserError(_tokenizer_mismatch(reference, shards))
        if facts.get("finished") is False and not allow_unfinished:
            raise UserError(
                f"{reference.name} is of a run that stopped at step {facts.get('step')} before its end; "
                "finish the training, or give --allow_unfinished"
            )


def load_model_and_tokenizer(
    reference: ModelReference, shards: Shards, dtype: str, scratch: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model, on this rank's device, and the model's tokenizer.

    `convert_checkpoint` must have exported a checkpoint into `scratch` before this call. Raises UserError if an export's
    files are corrupt, if the tokenizer is not that of the shards, or if embeddings for the shards' tokens are missing.
    """
    name = str(scratch / "export") if reference.kind == "checkpoint" else reference.name
    if reference.kind == "export" and distributed.is_main_process():
        atomic_dir.verify_digests(Path(name))  # rank 0 verifies the files for all ranks
    load.load_config(name)  # raises a clearer error than load_tokenizer for a folder without a model
    tokenizer = load_tokenizer(name)
    if fingerprint(tokenizer) != shards.facts["tokenizer_fingerprint"]:
        raise UserError(_tokenizer_mismatch(reference, shards))
    model = load.load_model(name, dtype)
    load.check_vocabulary(model.config, shards.max_token_id, name)
    model.to(device=load.local_device())  # type: ignore[call-arg]
    return model, tokenizer


def convert_checkpoint(reference: ModelReference, scratch: Path) -> None:
    """Export a checkpoint into `scratch`, which all ranks must be able to read. Does nothing on ranks other than 0."""
    if reference.kind == "checkpoint" and distributed.is_main_process():
        convert(ConvertSettings(checkpoint_dir=reference.name, output_dir=str(scratch / "export")))


def _tokenizer_mismatch(reference: ModelReference, shards: Shards) -> str:
    return (
        f"{reference.name} was not trained with the tokenizer of {shards.path}, so their token ids differ; prepare the test "
        "shards with the model's tokenizer"
    )
