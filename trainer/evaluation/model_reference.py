"""What is evaluated: an export, a checkpoint or any causal LM; where its results go, and its weights in memory."""

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

_DIGESTED = ("*.safetensors", "*.json", "*.bin", "*.model", "*.txt")


@dataclass(frozen=True)
class ModelReference:
    """A model on disk or on the hub. `facts` are those of its manifest, {} if it has none."""

    name: str
    kind: str  # "export", "checkpoint" or "model"
    facts: dict[str, Any]

    @property
    def method(self) -> str | None:
        return self.facts.get("method")

    @property
    def run(self) -> RunDirectory | None:
        """The run directory it lies in, if it does."""
        path = Path(self.name).absolute()
        if self.kind == "export" and RunDirectory(path.parent).export == path:
            return RunDirectory(path.parent)
        if self.kind == "checkpoint" and RunDirectory(path.parent.parent).checkpoints == path.parent:
            return RunDirectory(path.parent.parent)
        return None


def find_model(name_or_path: str) -> ModelReference:
    """Look at what `model_name_or_path` names; a run directory stands for its export.

    Raises UserError for an unfinished directory and for what is neither a folder nor on the hub.
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


def content_digest(student: ModelReference) -> str:
    """Of the content: the manifest's, which names every file's; of a local model its files'; of a hub name the commit."""
    folder = Path(student.name)
    if student.kind != "model":
        return atomic_dir.manifest_digest(folder)
    hasher = hashlib.sha256()
    if not folder.is_dir():
        revision = getattr(load.load_config(student.name), "_commit_hash", None)
        hasher.update(f"{student.name}@{revision}".encode())
        return hasher.hexdigest()
    for path in sorted({path for pattern in _DIGESTED for path in folder.glob(pattern)}):
        hasher.update(f"{path.name} {atomic_dir.file_digest(path)}\n".encode())
    return hasher.hexdigest()


def check_same_tokenizer(students: Mapping[str, ModelReference]) -> None:
    """Refuse students that would hand each other tokens of different tokenizers. Raises UserError naming both."""
    known = [
        (part, student, student.facts["tokenizer_fingerprint"])
        for part, student in students.items()
        if student.facts.get("tokenizer_fingerprint")
    ]
    for (part, one, ours), (other_part, other, theirs) in itertools.pairwise(known):
        if ours != theirs:
            raise UserError(
                f"the {part} {one.name} and the {other_part} {other.name} have different tokenizers, and what one writes "
                "the other has to read; train both on the same shards"
            )


def check_model(student: ModelReference, shards: Shards, allow_unfinished: bool) -> None:
    """Refuse a student that cannot read these shards, or one that is not finished unless that was asked for."""
    theirs, ours = student.facts.get("tokenizer_fingerprint"), shards.facts["tokenizer_fingerprint"]
    if theirs is not None and theirs != ours:
        raise UserError(_other_tokenizer(student, shards))
    if student.facts.get("finished") is False and not allow_unfinished:
        raise UserError(
            f"{student.name} is of a run that stopped at step {student.facts.get('step')} before its end; "
            "finish the training, or give --allow_unfinished"
        )


def load_model_and_tokenizer(
    student: ModelReference, shards: Shards, dtype: str, scratch: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Weights on this rank's device, and the tokenizer. Rank 0 has called `convert_checkpoint` before.

    Raises UserError for damaged files, and for a tokenizer that is not the shards'.
    """
    folder = _export_in(scratch) if student.kind == "checkpoint" else Path(student.name)
    if student.kind == "export" and distributed.is_main_process():
        atomic_dir.verify_digests(folder)  # once for all ranks
    name = student.name if student.kind == "model" else str(folder)
    load.load_config(name)  # refuses a folder without a model before its tokenizer is looked for
    tokenizer = load_tokenizer(name)
    if fingerprint(tokenizer) != shards.facts["tokenizer_fingerprint"]:
        raise UserError(_other_tokenizer(student, shards))
    model = load.load_model(name, dtype)
    load.check_vocabulary(model.config, shards.max_token_id, name)
    model.to(device=load.device())  # type: ignore[call-arg]
    return model, tokenizer


def convert_checkpoint(student: ModelReference, scratch: Path) -> None:
    """Make a temporary export of a checkpoint below `scratch` (rank 0; every rank must see the folder)."""
    from trainer.export.convert import convert

    if student.kind == "checkpoint" and distributed.is_main_process():
        convert(ConvertSettings(checkpoint_dir=student.name, output_dir=str(_export_in(scratch))))


def _export_in(scratch: Path) -> Path:
    return scratch / "export"


def _other_tokenizer(student: ModelReference, shards: Shards) -> str:
    return (
        f"{student.name} was not trained with the tokenizer of {shards.path}: a student would read other tokens than it "
        "learned; prepare the test shards with the student's tokenizer"
    )
