"""Named instants of a rank at which injection.py can kill it.

Each is a function that patches the trainer so that it calls `die` at the instant. `now` returns whether the optimizer
step of the fault is running; `step` is its number, counted from 1.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Die = Callable[[], None]
Now = Callable[[], bool]


def wrap(
    holder: Any,
    name: str,
    before: Callable[..., None] | None = None,
    after: Callable[..., None] | None = None,
) -> None:
    """Call `before(*arguments)` before and `after(*arguments)` after every call of `holder.name`."""
    original = getattr(holder, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if before:
            before(*arguments)
        result = original(*arguments, **named)
        if after:
            after(*arguments)
        return result

    setattr(holder, name, wrapped)


def _after_forward(die: Die, now: Now, step: int) -> None:
    from trainer.training import loop

    wrap(loop, "summed_token_loss", after=lambda *_: die() if now() else None)


def _in_backward(die: Die, now: Now, step: int) -> None:
    """When the gradient of the first layer's first norm is ready: all but those of the embeddings are."""
    from trainer.training import loop

    original = loop.summed_token_loss

    def summed_token_loss(engine: Any, *arguments: Any) -> Any:
        if now():
            parameter = next(p for name, p in engine.module.named_parameters() if ".0." in name)
            parameter.register_hook(lambda gradient: die())
        return original(engine, *arguments)

    loop.summed_token_loss = summed_token_loss


_COLLECTIVES = (
    "all_reduce",
    "reduce",
    "reduce_scatter_tensor",
    "all_gather_into_tensor",
    "all_gather",
    "broadcast",
)


def _in_a_collective_of(method: str) -> Callable[[Die, Now, int], None]:
    """After this rank has started a collective of the engine's `backward` or `step` asynchronously."""

    def arm(die: Die, now: Now, step: int) -> None:
        import deepspeed
        import torch.distributed as dist

        inside = False

        def enter(*_: Any) -> None:
            nonlocal inside
            inside = now()

        wrap(deepspeed.DeepSpeedEngine, method, before=enter)
        for name in _COLLECTIVES:
            original = getattr(dist, name)

            def begin(*arguments: Any, _original: Any = original, **named: Any) -> Any:
                if not inside:
                    return _original(*arguments, **named)
                _original(*arguments, **{**named, "async_op": True})
                return die()

            setattr(dist, name, begin)

    return arm


def _before_the_update(die: Die, now: Now, step: int) -> None:
    from trainer.training import loop

    wrap(loop, "all_reduce_loss_and_stop", after=lambda *_: die() if now() else None)


def _after_the_update(die: Die, now: Now, step: int) -> None:
    from trainer.training.watchdog import Watchdog

    wrap(Watchdog, "report_step", before=lambda self, done: die() if done == step else None)


def _half_a_line(die: Die, now: Now, step: int) -> None:
    from trainer.training.metrics_log import MetricsLog

    def write(self: Any, line: dict[str, Any]) -> None:
        if line["step"] == step:
            text = json.dumps(line)
            self._file.write(text[: len(text) // 2])
            self._file.flush()
            die()

    wrap(MetricsLog, "write", before=write)


def _half_an_evaluation(die: Die, now: Now, step: int) -> None:
    """The last brace of the line is missing."""
    from trainer.training.metrics_log import MetricsLog

    def write(self: Any, line: dict[str, Any]) -> None:
        if "evaluation" in line:
            self._file.write(json.dumps(line)[:-1])
            self._file.flush()
            die()

    wrap(MetricsLog, "write", before=write)


def _half_a_file(die: Die, now: Now, step: int) -> None:
    from trainer.training.checkpoint import SafeCheckpointEngine

    original = SafeCheckpointEngine.save

    def save(self: Any, state_dict: Any, path: str) -> None:
        original(self, state_dict, path)
        if f"step-{step:06d}" in path:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    SafeCheckpointEngine.save = save  # type: ignore[method-assign]


def _saving(name: str, when: str) -> Callable[[Die, Now, int], None]:
    """Before or after a function called by the save of `step`."""

    def arm(die: Die, now: Now, step: int) -> None:
        from trainer.storage import atomic_dir
        from trainer.training import checkpoint

        saving = False

        def enter(engine: Any, run: Any, facts: Any, *_: Any) -> None:
            nonlocal saving
            saving = facts["step"] == step

        wrap(checkpoint, "save", before=enter)
        module, _, function = name.rpartition(".")
        holder = atomic_dir if module == "atomic_dir" else checkpoint
        wrap(holder, function, **{when: lambda *_: die() if saving else None})

    return arm


def _half_a_manifest(die: Die, now: Now, step: int) -> None:
    from trainer.storage import atomic_dir

    def write(path: Path, content: bytes) -> None:
        if path.name == atomic_dir.MANIFEST and f"step-{step:06d}" in str(path):
            path.write_bytes(content[: len(content) // 2])
            die()

    wrap(atomic_dir, "_write_and_fsync", before=write)


def _rename(when: str, suffix: str = "") -> Callable[[Die, Now, int], None]:
    """Before or after the rename to the checkpoint of `step`, or to any name with `suffix`."""

    def arm(die: Die, now: Now, step: int) -> None:
        def check(source: Any, target: Any) -> None:
            name = Path(target).name
            if name == f"step-{step:06d}" or (suffix and name.endswith(suffix)):
                die()

        for holder, function in ((os, "rename"), (Path, "rename")):
            if not suffix or holder is Path:
                wrap(holder, function, **{when: check})

    return arm


def _half_removed(die: Die, now: Now, step: int) -> None:
    """After one file of an old checkpoint, which is already renamed, is removed."""

    def remove(path: Any, *_: Any) -> None:
        if str(path).endswith(".removed.tmp") and os.path.isdir(path):
            next(file for file in sorted(Path(path).iterdir()) if file.is_file()).unlink()
            die()

    wrap(shutil, "rmtree", before=remove)


def _building(when: str) -> Callable[[Die, Now, int], None]:
    """Before or after the rename that publishes a directory of any kind."""

    def arm(die: Die, now: Now, step: int) -> None:
        wrap(os, "rename", **{when: lambda *_: die()})

    return arm


def _half_tokenised(die: Die, now: Now, step: int) -> None:
    from trainer.shards.prepare import ShardWriter

    wrap(ShardWriter, "add", after=lambda self, *_: die() if self.num_problems == 30 else None)


def _half_any_manifest(die: Die, now: Now, step: int) -> None:
    from trainer.storage import atomic_dir

    def write(path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])
        die()

    wrap(atomic_dir, "_write_and_fsync", before=write)


def _holding_the_lock(die: Die, now: Now, step: int) -> None:
    from trainer.training.watchdog import Watchdog

    wrap(Watchdog, "__init__", before=lambda *_: die())


def _in_the_run_files(die: Die, now: Now, step: int) -> None:
    from trainer.training import run_files

    wrap(run_files.architecture, "record_architecture", before=lambda *_: die())


def _in_the_first_weights(die: Die, now: Now, step: int) -> None:
    from trainer.models import load

    wrap(load, "write_random_weights", after=lambda *_: die())


def _half_resumed(die: Die, now: Now, step: int) -> None:
    """One range of a partition is loaded, the rest still has its initial weights."""
    from trainer.training import reshard

    wrap(reshard, "_copy", after=lambda *_: die())


def _at_the_end(die: Die, now: Now, step: int) -> None:
    from trainer.training.metrics_log import MetricsLog

    wrap(MetricsLog, "close", before=lambda *_: die())


INSTANTS: dict[str, Callable[[Die, Now, int], None]] = {
    "holding the lock": _holding_the_lock,
    "in the run's files": _in_the_run_files,
    "in the first weights": _in_the_first_weights,
    "half resumed": _half_resumed,
    "after forward": _after_forward,
    "in backward": _in_backward,
    "in the reduce": _in_a_collective_of("backward"),
    "before the update": _before_the_update,
    "in the update's collective": _in_a_collective_of("step"),
    "after the update": _after_the_update,
    "half a line of metrics": _half_a_line,
    "half an evaluation": _half_an_evaluation,
    "in save: half a file": _half_a_file,
    "in save: one rank has written": _saving("_check_written", "before"),
    "in save: before the digests": _saving("atomic_dir.digest_files", "before"),
    "in save: before the manifest": _saving("atomic_dir.publish", "before"),
    "in save: half a manifest": _half_a_manifest,
    "in save: before the rename": _rename("before"),
    "in save: after the rename": _rename("after"),
    "before the pruning": _saving("prune", "before"),
    "in the pruning": _rename("after", ".removed.tmp"),
    "in the pruning: half removed": _half_removed,
    "at the end": _at_the_end,
    "building: half tokenised": _half_tokenised,
    "building: half a manifest": _half_any_manifest,
    "building: before the rename": _building("before"),
    "building: after the rename": _building("after"),
}
