"""Find the checkpoint to convert and the output directory, and detect an existing export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.runtime import terminal
from trainer.settings import DTYPES
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory

MODEL_FOLDER = "model"  # of a checkpoint: config, generation config and tokenizer


@dataclass(frozen=True)
class CheckpointSource:
    """A finished checkpoint whose file sizes match its manifest."""

    path: Path
    facts: dict[str, Any]
    digest: str  # of the manifest

    @property
    def model_folder(self) -> Path:
        return self.path / MODEL_FOLDER


def find_checkpoint(path: Path) -> CheckpointSource:
    """Return the checkpoint at `path`, or the newest valid one if `path` is a run directory.

    Raises UserError if there is none, or it is unfinished, incomplete, or the files of its model folder are corrupt. Weight
    files are compared with the manifest by size only; their checksums are compared when they are read.
    """
    run = RunDirectory(path)
    if not run.checkpoints.is_dir() and not run.settings.is_file():
        return _open(path)
    for step in reversed(run.checkpoint_steps()):
        if not atomic_dir.is_complete(run.checkpoint(step)):
            continue
        try:
            return _open(run.checkpoint(step))
        except UserError as error:
            terminal.warning(f"{error}; trying the checkpoint before it")
    raise UserError(
        f"{run.checkpoints} holds no finished checkpoint; train first, or name a checkpoint directory"
    )


def _open(path: Path) -> CheckpointSource:
    manifest = atomic_dir.read_manifest(path, kind="checkpoint")
    files, facts = manifest["files"], manifest["facts"]
    atomic_dir.verify_sizes(path, files, files)
    atomic_dir.verify_digests(path, [name for name in files if name.startswith(f"{MODEL_FOLDER}/")])
    if f"{MODEL_FOLDER}/config.json" not in files:
        raise UserError(
            f"{path / MODEL_FOLDER / 'config.json'} is missing; the weights cannot be loaded without it"
        )
    for name, known in {"zero_stage": (0, 1, 2, 3), "dtype": DTYPES}.items():
        if facts.get(name) not in known:
            raise UserError(
                f"{path / atomic_dir.MANIFEST}: {name} is {facts.get(name)!r}, expected one of {known}"
            )
    if not isinstance(facts.get("world_size"), int) or facts["world_size"] < 1:
        raise UserError(
            f"{path / atomic_dir.MANIFEST}: world_size is {facts.get('world_size')!r}, expected 1 or more"
        )
    return CheckpointSource(path, facts, atomic_dir.manifest_digest(path))


def output_directory(source: CheckpointSource, output_dir: str) -> Path:
    """Return `output_dir`, else the export folder of the checkpoint's run. Raises UserError if there is no run."""
    if output_dir:
        return Path(output_dir)
    run = RunDirectory(source.path.absolute().parent.parent)
    if run.checkpoints != source.path.absolute().parent:
        raise UserError(f"{source.path} is not inside a run directory, so it has no export/; give output_dir")
    return run.export


def is_already_exported(final: Path, facts: dict[str, Any], overwrite: bool) -> bool:
    """Return whether `final` is an intact export with these facts; False if it may be written.

    Raises UserError if `final` is not an export, or is an export with other facts and `overwrite` is off.
    """
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return False
    if not atomic_dir.is_complete(final):
        raise UserError(
            f"{final} exists and is not an export; choose another output_dir or remove it yourself"
        )
    manifest = atomic_dir.read_manifest(final, kind="export")
    if overwrite:
        return False
    different = [name for name, value in facts.items() if manifest["facts"].get(name) != value]
    if different:
        made_from = manifest["facts"].get("checkpoint", "another checkpoint")
        raise UserError(
            f"{final} is an export of {made_from} with another {' and '.join(different)}; "
            "give --overwrite to replace it"
        )
    try:
        atomic_dir.verify_sizes(final, manifest["files"], manifest["files"])
    except UserError as error:
        raise UserError(f"{error}; give --overwrite to write the export again") from None
    return True
