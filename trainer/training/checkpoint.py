"""Checkpoints of a run. All ranks write into a staging directory; rank 0 adds digests and renames the directory.

DeepSpeed's `latest` file and loader are not used. With ZeRO-1, `latest` is written before all ranks have saved. The
loader accepts corrupt bytes, and it unpickles all files with `weights_only=False`. Here the digests are checked first,
and then the files are read as byte ranges (reshard.py).

No RNG state is saved. For every micro-batch, `loop.seed_dropout` seeds dropout from the run's seed and the index of the
micro-batch's first pack, so a resumed run has the same dropout as an uninterrupted run.
"""

import functools
import io
import shutil
from collections import ChainMap
from pathlib import Path
from typing import IO, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from trainer.errors import UserError
from trainer.runtime import distributed, library_internals, terminal
from trainer.storage import atomic_dir
from trainer.storage.manifest import CheckpointFacts
from trainer.storage.run_directory import RunDirectory
from trainer.training import reshard

KIND = "checkpoint"
MODEL = "model"  # subfolder with config and tokenizer, so an export does not need the run directory


class SafeCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """DeepSpeed checkpoint engine that can save but not load. `written`: the files written so far.

    The first error is stored in `error`. It is not raised at once, because the other ranks wait in a collective. After
    an error, no more files are written. `unwritten_bytes`: total size of the files that are missing because of the error.
    """

    written: list[Path]
    error: str | None = None
    unwritten_bytes = 0

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
        raise AssertionError("reshard.py reads checkpoints, DeepSpeed does not")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


class _ByteCounter(io.RawIOBase):
    """A file that counts the bytes written to it and discards them."""

    num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.num_bytes += len(content)
        return len(content)


_errors_on_all_ranks = functools.partial(
    distributed.errors_on_all_ranks,
    lambda problem: f"the checkpoint could not be written: {problem}; the previous checkpoint is intact",
)


def save(engine: Any, run: RunDirectory, facts: CheckpointFacts, model_files: Path) -> None:
    """Collective. Publish `checkpoints/step-NNNNNN` atomically. Raises UserError on every rank if a rank cannot write.

    `model_files`: folder with the model's config and tokenizer. This folder is copied into the checkpoint.
    """
    final, is_main = run.checkpoint(facts["step"]), distributed.is_main_process()
    staging = final
    with _errors_on_all_ranks():
        if is_main:
            staging = atomic_dir.create_staging(final)
    staging = distributed.broadcast_object(staging)
    writer = engine.checkpoint_engine
    # On a full disk, copying zero_to_fp32.py would fail on rank 0 only, and the other ranks would wait in a collective.
    library_internals.leave_out_recovery_script(engine)
    try:
        names = reshard.saved_names(engine)
        engine.save_checkpoint(str(staging.parent), tag=staging.name, client_state=names, save_latest=False)
        _check_written(writer, staging)
        with _errors_on_all_ranks():
            if is_main:
                shutil.copytree(model_files, staging / MODEL)
                writer.written += [path for path in (staging / MODEL).rglob("*") if path.is_file()]
            written = [path.relative_to(staging).as_posix() for path in writer.written]
            digests = atomic_dir.digest_files(staging, written)
        files = dict(ChainMap(*distributed.gather_objects(digests)))
        with _errors_on_all_ranks():
            if is_main:
                # `replace`: if the run was resumed from an earlier step, an old checkpoint of this step may exist.
                atomic_dir.publish(staging, final, KIND, facts, files, replace=True)
    except BaseException:
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _check_written(writer: SafeCheckpointEngine, staging: Path) -> None:
    """Collective. Raise UserError if a rank could not write a file. The message says how much disk space is missing."""
    errors, unwritten = zip(*distributed.gather_objects((writer.error, writer.unwritten_bytes)), strict=True)
    error = next(filter(None, errors), None)
    if error is None:
        return
    needed, free = sum(unwritten), shutil.disk_usage(staging.parent).free
    distributed.barrier()  # rank 0 must not remove the staging directory before all ranks have read the free space
    if needed <= free:
        raise UserError(f"{error}; the previous checkpoint is intact")
    raise UserError(
        f"{error}; {needed} more bytes are needed and {free} are free there: {needed - free} bytes are missing. "
        "The previous checkpoint is intact; free disk space and start again"
    )


def prune(run: RunDirectory, keep: int) -> None:
    """On rank 0, remove all complete checkpoints except the newest `keep`."""
    if not distributed.is_main_process():
        return
    complete = [step for step in run.checkpoint_steps() if atomic_dir.is_complete(run.checkpoint(step))]
    for step in complete[:-keep]:
        _remove(run.checkpoint(step))


def remove_all(run: RunDirectory) -> None:
    """Collective. Remove every checkpoint of a run, for --overwrite_output_dir."""
    if distributed.is_main_process():
        for step in run.checkpoint_steps():
            _remove(run.checkpoint(step))
    distributed.barrier()


def latest_valid(run: RunDirectory) -> Path | None:
    """Collective. Return the newest checkpoint without damage, or None if the run has no checkpoint.

    Warns about each newer, damaged checkpoint. Raises UserError if all checkpoints are damaged.
    """
    steps = distributed.broadcast_object(run.checkpoint_steps())
    for step in reversed(steps):
        problem = _find_damage(run.checkpoint(step))
        if problem is None:
            return run.checkpoint(step)
        terminal.warning(f"checkpoint skipped: {problem}")
    if steps:
        raise UserError(
            f"{run.checkpoints} holds {len(steps)} checkpoint(s) but none is valid; "
            "restore one, or give --overwrite_output_dir to start from zero"
        )
    return None


def check_valid(path: Path) -> None:
    """Collective. Raise UserError on every rank if the checkpoint is damaged or not complete."""
    problem = _find_damage(path)
    if problem is not None:
        raise UserError(problem)


def load(engine: Any, path: Path) -> None:
    """Collective. Load a valid checkpoint into `engine`. Checkpoint and engine may differ in world size and ZeRO stage."""
    facts = atomic_dir.read_manifest(path, KIND)["facts"]
    reshard.load(engine, path, facts["zero_stage"], facts["world_size"], facts["dtype"])


def _find_damage(path: Path) -> str | None:
    """Collective. Return a message about damage in a checkpoint, or None if it has no damage. Each rank checks some files."""
    problem = None
    try:
        names = sorted(atomic_dir.read_manifest(path, KIND)["files"])
        environment = distributed.environment()
        atomic_dir.verify_digests(path, names[environment.rank :: environment.world_size])
    except UserError as error:
        problem = str(error)
    return next(filter(None, distributed.gather_objects(problem)), None)


def _remove(path: Path) -> None:
    """Rename a checkpoint, then remove it, so that no partly removed directory has the name of a checkpoint."""
    hidden = path.parent / f".{path.name}.removed.tmp"
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
