"""Save and load the whole state of a run: all ranks write, digests are checked, a rename commits.

DeepSpeed's own protocol is not used: ZeRO-1 publishes `latest` before the other ranks have saved, a flipped run of
bytes loads without a word, and everything is unpickled with `weights_only=False`. Its files are written below a
temporary name here, and read only after their digests were checked, as byte ranges (reshard.py).

No RNG state is saved: dropout is seeded from (seed, pack), see loop.py, so a resumed run draws what an undisturbed
one would have drawn, on every rank.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from trainer.errors import UserError
from trainer.runtime import distributed, terminal
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory
from trainer.training import reshard

KIND = "checkpoint"
MODEL = "model"  # config and tokenizer, so that a checkpoint can be converted wherever it is taken


class SafeCheckpointEngine(CheckpointEngine):
    """DeepSpeed's file access, ours: remembers what was written, keeps errors, reads nothing.

    An error while saving is kept in `error` instead of raised, because the other ranks wait in a collective. From then
    on nothing is written, but `unwritten_bytes` counts what would have been.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self.name = "SafeCheckpointEngine"
        self.written: list[Path] = []
        self.error: str | None = None
        self.unwritten_bytes = 0

    def create(self, info: CheckpointCommitInfo) -> None:
        self.written, self.error, self.unwritten_bytes = [], None, 0

    def save(self, state_dict: Any, path: str) -> None:
        if self.error is None:
            try:
                torch.save(state_dict, path)
                self.written.append(Path(path))
                return
            except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
                self.error = f"could not write {path}: {str(error).splitlines()[0]}"
                Path(path).unlink(missing_ok=True)
        counter = _ByteCounter()
        torch.save(state_dict, cast(IO[bytes], counter))
        self.unwritten_bytes += counter.num_bytes

    def load(self, path: str, map_location: Any = None) -> Any:
        raise AssertionError("checkpoints are read by reshard.py, not by DeepSpeed")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


class _ByteCounter(io.RawIOBase):
    """Takes everything and keeps its size."""

    num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.num_bytes += len(content)
        return len(content)


def save(engine: Any, run: RunDirectory, step: int, facts: dict[str, Any], model_files: Path) -> None:
    """Collective. Write `checkpoints/step-NNNNNN`; it is complete or not there. Raises UserError on every rank."""
    final, first = run.checkpoint(step), distributed.is_main_process()
    begun = _on_all_ranks(lambda: str(atomic_dir.create_staging(final)) if first else "")
    staging = Path(distributed.broadcast_object(begun))
    writer = engine.checkpoint_engine
    # DeepSpeed would leave converters beside the checkpoints, where rank 0 alone may meet a full disk.
    engine._copy_recovery_script = lambda save_path: None
    try:
        names = reshard.saved_names(engine)
        engine.save_checkpoint(str(staging.parent), tag=staging.name, client_state=names, save_latest=False)
        _check_written(writer, staging)
        _on_all_ranks(
            lambda: _copy_model_files(model_files, staging / MODEL, writer.written) if first else None
        )
        ours = [path.relative_to(staging).as_posix() for path in writer.written]
        digests = distributed.gather_objects(_on_all_ranks(lambda: atomic_dir.digest_files(staging, ours)))
        files = {name: digest for part in digests for name, digest in part.items()}
        _on_all_ranks(lambda: _commit(staging, final, facts, files) if first else None)
    except BaseException:
        if first:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _on_all_ranks(action: Callable[[], Any]) -> Any:
    """Collective. Do it; if the file system refuses on any rank, a UserError on all: nobody waits for the others."""
    result, error = None, None
    try:
        result = action()
    except (OSError, shutil.Error) as problem:
        error = f"the checkpoint could not be written: {problem}; the one before it is untouched"
    distributed.raise_on_all_ranks(error)
    return result


def _copy_model_files(source: Path, target: Path, written: list[Path]) -> None:
    shutil.copytree(source, target)
    written += [path for path in target.rglob("*") if path.is_file()]


def _commit(staging: Path, final: Path, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Into place; a checkpoint of the same step, which was passed over or not gone on from, is replaced."""
    if not final.exists():
        return atomic_dir.publish(staging, final, KIND, facts, files)
    fresh = staging.with_name(staging.name.replace(".tmp", ".fresh.tmp"))
    atomic_dir.publish(staging, fresh, KIND, facts, files)
    atomic_dir.replace_directory(final, fresh)


def _check_written(writer: SafeCheckpointEngine, staging: Path) -> None:
    """Collective. Raises UserError if a file of any rank is missing, and says by how much the disk is too small."""
    errors = distributed.gather_objects((writer.error, writer.unwritten_bytes))
    failed = [error for error, _ in errors if error]
    if not failed:
        return
    needed, free = sum(unwritten for _, unwritten in errors), shutil.disk_usage(staging.parent).free
    missing = max(0, needed - free)
    distributed.barrier()  # nobody removes anything before all have looked
    space = f"{needed} more bytes are needed and {free} are free there: {missing} bytes are missing"
    raise UserError(
        f"{failed[0]}; {space}. The checkpoint before it is untouched; make room and start again"
        if missing
        else f"{failed[0]}; the checkpoint before it is untouched"
    )


def prune(run: RunDirectory, keep: int) -> None:
    """Remove all but the newest `keep` finished checkpoints (rank 0)."""
    if not distributed.is_main_process():
        return
    finished = [step for step in run.checkpoint_steps() if atomic_dir.is_complete(run.checkpoint(step))]
    for step in finished[:-keep]:
        _remove(run.checkpoint(step))


def remove_all(run: RunDirectory) -> None:
    """Forget every checkpoint of a run (rank 0), because the user asked to start from zero."""
    if distributed.is_main_process():
        for step in run.checkpoint_steps():
            _remove(run.checkpoint(step))
    distributed.barrier()


def latest_valid(run: RunDirectory) -> Path | None:
    """Collective. The newest checkpoint all of whose digests are right; damaged ones are named and passed over.

    None if there is none at all. Raises UserError if there are checkpoints but not a valid one: starting from zero
    over them must be asked for.
    """
    steps = distributed.broadcast_object(list(reversed(run.checkpoint_steps())))
    for step in steps:
        problem = _damage(run.checkpoint(step))
        if problem is None:
            return run.checkpoint(step)
        terminal.warning(f"checkpoint passed over: {problem}")
    if steps:
        raise UserError(
            f"{run.checkpoints} holds {len(steps)} checkpoint(s) but none is valid; "
            "restore one, or give --overwrite_output_dir to start from zero"
        )
    return None


def check_valid(path: Path) -> None:
    """Collective. Raises UserError on every rank if the checkpoint is damaged or not finished."""
    problem = _damage(path)
    if problem is not None:
        raise UserError(problem)


def load(engine: Any, path: Path) -> None:
    """Collective. Weights, masters and moments of a checkpoint that was found valid, of whatever layout."""
    facts = atomic_dir.read_manifest(path, KIND)["facts"]
    reshard.load(engine, path, facts["zero_stage"], facts["world_size"], facts["dtype"])


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, the same answer on all ranks; each rank digests its share of the files."""
    problem = None
    try:
        names = sorted(atomic_dir.read_manifest(path, KIND)["files"])
        world = distributed.environment()
        atomic_dir.verify_digests(path, names[world.rank :: world.world_size])
    except UserError as error:
        problem = str(error)
    return next((text for text in distributed.gather_objects(problem) if text), None)


def _remove(path: Path) -> None:
    """Out of sight first, so that a half removed checkpoint is never found."""
    hidden = path.parent / f".{path.name}.removed.tmp"
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
