"""Save and load the whole state of a run: all ranks write, digests are checked, a rename commits.

DeepSpeed's own protocol is not used: ZeRO-1 publishes `latest` before the other ranks have saved, a flipped run of
bytes loads without a word, and everything is unpickled with `weights_only=False`. Its files are written below a
temporary name here, and read only after their digests were checked, with `weights_only=True`.

No RNG state is saved: dropout is seeded from (seed, pack), see loop.py, so a resumed run draws what an undisturbed
one would have drawn, on every rank.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from trainer import commit, distributed, terminal
from trainer.errors import UserError
from trainer.run_directory import RunDirectory

KIND = "checkpoint"
MODEL = "model"  # config and tokenizer, so that a checkpoint can be converted wherever it is taken
SAFE_CLASSES = [fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum]


class SafeCheckpointEngine(CheckpointEngine):
    """DeepSpeed's file access, ours: remembers what was written, keeps errors, unpickles nothing but weights.

    An error while saving is kept in `error` instead of raised, because the other ranks wait in a collective.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self.name = "SafeCheckpointEngine"
        self.written: list[Path] = []
        self.error: str | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        self.written, self.error = [], None

    def save(self, state_dict: Any, path: str) -> None:
        if self.error:
            return
        try:
            torch.save(state_dict, path)
            self.written.append(Path(path))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            self.error = (
                f"could not write {path}: {str(error).splitlines()[0]}{_free_bytes(Path(path).parent)}"
            )

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(SAFE_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


def save(engine: Any, run: RunDirectory, step: int, facts: dict[str, Any], model_files: Path) -> None:
    """Collective. Write `checkpoints/step-NNNNNN`; it is complete or not there. Raises UserError on every rank."""
    final = run.checkpoint(step)
    staging = Path(
        distributed.broadcast_object(str(commit.begin(final)) if distributed.is_main_process() else None)
    )
    writer = engine.checkpoint_engine
    try:
        engine.save_checkpoint(str(staging.parent), tag=staging.name, save_latest=False)
        if distributed.is_main_process() and not writer.error:
            # DeepSpeed leaves converters beside the checkpoints; ours is tools/convert_checkpoint.py.
            for script in ("zero_to_fp32.py", "zero_to_torch.py"):
                (staging.parent / script).unlink(missing_ok=True)
            shutil.copytree(model_files, staging / MODEL)
            writer.written += [path for path in (staging / MODEL).rglob("*") if path.is_file()]
        distributed.raise_together(writer.error)
        names = [path.relative_to(staging).as_posix() for path in writer.written]
        digests = distributed.gather_objects(commit.digest_files(staging, names))
        if distributed.is_main_process():
            files = {name: digest for part in digests for name, digest in part.items()}
            commit.finish(staging, final, KIND, facts, files)
        distributed.barrier()
    except BaseException:
        if distributed.is_main_process():
            shutil.rmtree(staging, ignore_errors=True)
        raise


def prune(run: RunDirectory, keep: int) -> None:
    """Remove all but the newest `keep` finished checkpoints (rank 0)."""
    if not distributed.is_main_process():
        return
    finished = [step for step in run.checkpoint_steps() if commit.is_finished(run.checkpoint(step))]
    for step in finished[:-keep]:
        _remove(run.checkpoint(step))


def remove_all(run: RunDirectory) -> None:
    """Forget every checkpoint of a run (rank 0), because the user asked to start from zero."""
    if distributed.is_main_process():
        for step in run.checkpoint_steps():
            _remove(run.checkpoint(step))
    distributed.barrier()


def newest_valid(run: RunDirectory) -> Path | None:
    """Collective. The newest checkpoint all of whose digests are right; damaged ones are named and passed over.

    None if there is none at all. Raises UserError if there are checkpoints but not a valid one: starting from zero
    over them must be asked for.
    """
    steps = distributed.broadcast_object(list(reversed(run.checkpoint_steps())))
    for step in steps:
        problem = _damage(run.checkpoint(step))
        if problem is None:
            return run.checkpoint(step)
        terminal.warn(f"checkpoint passed over: {problem}")
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
    """Collective. Weights, master weights and optimizer state of a checkpoint that was found valid."""
    found, _ = engine.load_checkpoint(str(path.parent), tag=path.name, load_lr_scheduler_states=False)
    if found is None:
        raise RuntimeError(f"DeepSpeed did not load {path}")


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, the same answer on all ranks; each rank digests its share of the files."""
    problem = None
    try:
        names = sorted(commit.read_manifest(path, KIND)["files"])
        world = distributed.world()
        commit.verify(path, names[world.rank :: world.world_size])
    except UserError as error:
        problem = str(error)
    return next((text for text in distributed.gather_objects(problem) if text), None)


def _free_bytes(folder: Path) -> str:
    return f" ({shutil.disk_usage(folder).free} bytes are free there)" if folder.is_dir() else ""


def _remove(path: Path) -> None:
    """Out of sight first, so that a half removed checkpoint is never found."""
    hidden = path.parent / f".{path.name}.removed.tmp"
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
