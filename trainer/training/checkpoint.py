"""Checkpoints of a run: all ranks write into a staging directory, digests are recorded, a rename publishes it.

DeepSpeed's own protocol is not used: ZeRO-1 publishes `latest` before the other ranks have saved, corrupt bytes load
without an error, and everything is unpickled with `weights_only=False`. Here DeepSpeed's files are read only after
their digests were checked, as byte ranges (reshard.py).

No RNG state is saved: dropout is seeded from (seed, pack), see `loop.seed_dropout`, so a resumed run draws the same
numbers on every rank.
"""

from __future__ import annotations

import functools
import io
import shutil
from pathlib import Path
from typing import IO, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from trainer.errors import UserError
from trainer.runtime import distributed, library_internals, terminal
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory
from trainer.training import reshard

KIND = "checkpoint"
MODEL = "model"  # folder of config and tokenizer, so that a copied checkpoint can be converted


class SafeCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's file access for saving: lists the written files in `written`, and cannot load.

    The first error is stored in `error` instead of raised, because the other ranks wait in a collective. After it
    nothing is written, and `unwritten_bytes` counts the bytes of the files left out.
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


def save(engine: Any, run: RunDirectory, step: int, facts: dict[str, Any], model_files: Path) -> None:
    """Collective. Publish `checkpoints/step-NNNNNN` atomically. Raises UserError on every rank."""
    final, is_main = run.checkpoint(step), distributed.is_main_process()
    created = ""
    with _errors_on_all_ranks():
        if is_main:
            created = str(atomic_dir.create_staging(final))
    staging = Path(distributed.broadcast_object(created))
    writer = engine.checkpoint_engine
    # DeepSpeed would copy zero_to_fp32.py beside the checkpoints, on rank 0 only, where the disk may be full.
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
        files = {
            name: digest
            for of_rank in distributed.gather_objects(digests)
            for name, digest in of_rank.items()
        }
        with _errors_on_all_ranks():
            if is_main:
                # One of the same step that was damaged or not resumed from is replaced.
                atomic_dir.publish(staging, final, KIND, facts, files, replace=True)
    except BaseException:
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _check_written(writer: SafeCheckpointEngine, staging: Path) -> None:
    """Collective. Raise UserError with the missing disk space if a rank could not write one of its files."""
    errors = distributed.gather_objects((writer.error, writer.unwritten_bytes))
    failed = [error for error, _ in errors if error]
    if not failed:
        return
    needed, free = sum(unwritten for _, unwritten in errors), shutil.disk_usage(staging.parent).free
    missing = max(0, needed - free)
    distributed.barrier()  # rank 0 must not remove the staging directory before all have read the free space
    space = f"{needed} more bytes are needed and {free} are free there: {missing} bytes are missing"
    raise UserError(
        f"{failed[0]}; {space}. The previous checkpoint is intact; free disk space and start again"
        if missing
        else f"{failed[0]}; the previous checkpoint is intact"
    )


def prune(run: RunDirectory, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints (rank 0)."""
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
    """Collective. Return the newest checkpoint whose digests are all right, with a warning for each damaged one.

    None without any checkpoint. Raises UserError if there are checkpoints but none is valid.
    """
    steps = distributed.broadcast_object(list(reversed(run.checkpoint_steps())))
    for step in steps:
        problem = _find_damage(run.checkpoint(step))
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
    """Collective. Raise UserError on every rank if the checkpoint is damaged or not complete."""
    problem = _find_damage(path)
    if problem is not None:
        raise UserError(problem)


def load(engine: Any, path: Path) -> None:
    """Collective. Load weights, masters and moments of a valid checkpoint of any world size and ZeRO stage."""
    facts = atomic_dir.read_manifest(path, KIND)["facts"]
    reshard.load(engine, path, facts["zero_stage"], facts["world_size"], facts["dtype"])


def _find_damage(path: Path) -> str | None:
    """Collective. Return the first error of a checkpoint, None if it is valid; each rank digests its share of files."""
    problem = None
    try:
        names = sorted(atomic_dir.read_manifest(path, KIND)["files"])
        environment = distributed.environment()
        atomic_dir.verify_digests(path, names[environment.rank :: environment.world_size])
    except UserError as error:
        problem = str(error)
    return next((text for text in distributed.gather_objects(problem) if text), None)


def _remove(path: Path) -> None:
    """Rename, then remove: a partly removed checkpoint must not be found."""
    hidden = path.parent / f".{path.name}.removed.tmp"
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
