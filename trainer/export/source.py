"""Find the checkpoint to convert and the output directory; detect an existing export."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import UserError
from trainer.runtime import terminal
from trainer.settings import DTYPES
from trainer.storage import atomic_dir
from trainer.storage.manifest import CheckpointFacts
from trainer.storage.run_directory import RunDirectory

MODEL_FOLDER = "model"  # folder in a checkpoint that holds config, generation config and tokenizer


@dataclass(frozen=True)
class CheckpointSource:
    """A finished checkpoint whose file sizes match its manifest."""

    path: Path
    facts: CheckpointFacts
    digest: str  # SHA-256 of the manifest

    @property
    def model_folder(self) -> Path:
        return self.path / MODEL_FOLDER


def open_checkpoint(path: Path) -> CheckpointSource:
    """Return the checkpoint at `path`, or the latest valid checkpoint if `path` is a run directory.

    The sizes of all files and the digests of the model folder's files are compared with the manifest. The conversion
    verifies checksums of the weights while it reads the weights. Raises UserError if there is no finished checkpoint, if a
    file is missing or has a wrong size, or if a file of the model folder is corrupt.
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
    raise UserError(f"{run.checkpoints} holds no finished checkpoint; train first, or name a checkpoint")


def _open(path: Path) -> CheckpointSource:
    manifest = atomic_dir.read_manifest(path, kind="checkpoint")
    files, facts = manifest["files"], manifest["facts"]
    atomic_dir.verify_sizes(path, files, files)
    atomic_dir.verify_digests(path, [name for name in files if name.startswith(f"{MODEL_FOLDER}/")])
    if f"{MODEL_FOLDER}/config.json" not in files:
        raise UserError(f"{path / MODEL_FOLDER / 'config.json'} is missing; the weights need it to be loaded")
    for name, known in {"zero_stage": (0, 1, 2, 3), "dtype": DTYPES}.items():
        if (value := facts.get(name)) not in known:
            raise UserError(f"{path / atomic_dir.MANIFEST}: {name} is {value!r}, expected one of {known}")
    world_size = facts.get("world_size")
    if not isinstance(world_size, int) or world_size < 1:
        raise UserError(f"{path / atomic_dir.MANIFEST}: world_size is {world_size!r}, expected 1 or more")
    return CheckpointSource(path, facts, atomic_dir.manifest_digest(path))


def output_directory(source: CheckpointSource, output_dir: str) -> Path:
    """Return `output_dir`. If it is "", return the run's export folder, or raise UserError if the checkpoint is not in a run."""
    if output_dir:
        return Path(output_dir)
    for path in (source.path, source.path.absolute()):  # the path as given, if it is long enough
        run = RunDirectory(path.parent.parent)
        if run.checkpoints == path.parent:
            return run.export
    raise UserError(f"{source.path} is not inside a run directory, so it has no export/; give output_dir")


def is_already_exported(final: Path, facts: Mapping[str, object], overwrite: bool) -> bool:
    """Return True if `final` is an export with the checkpoint and options in `facts`, False if it must be written.

    With `overwrite`, the result is False for every export. Without `overwrite`, raises UserError if `final` is an
    export with a wrong file size, or an export of another checkpoint, dtype or maximum file size. Raises UserError in both
    cases if `final` has content that is not an export.
    """
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return False
    if not atomic_dir.is_complete(final):
        raise UserError(f"{final} exists and is not an export; remove it, or choose another output_dir")
    manifest = atomic_dir.read_manifest(final, kind="export")
    if overwrite:
        return False
    options = ("checkpoint_digest", "export_dtype", "max_shard_bytes")
    different = [name for name in options if manifest["facts"].get(name) != facts[name]]
    if different:
        made_from = manifest["facts"].get("checkpoint", "another checkpoint")
        difference = f"another {' and '.join(different)}"
        raise UserError(f"{final} is an export of {made_from} with {difference}; --overwrite replaces it")
    try:
        atomic_dir.verify_sizes(final, manifest["files"], manifest["files"])
    except UserError as error:
        raise UserError(f"{error}; give --overwrite to write the export again") from None
    return True
