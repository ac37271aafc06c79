"""One stage while it runs: its process, its bar, its log, and what became of it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from pathlib import Path

from trainer.runtime import process_group, terminal
from trainer.runtime.exit_codes import EXIT_PEER_LOST, EXIT_REQUEUE
from trainer.storage import atomic_dir
from trainer.storage.run_directory import AnnotationDirectory
from trainer.study import processes, stages, status
from trainer.study.stages import Stage
from trainer.study.study_file import Study

_UPDATE_SECONDS = 1.0
_TAIL_LINES = 15
# What launchers and libraries say around an error; the log has it all.
_NOISE = re.compile(r"\[(INFO|WARNING)\]|Killing subprocess|exits with return code|^\s*$|^=== ")


class StageJob:
    """A stage that has been started. `place` is its number among all, `cores` and `devices` are its own.

    `ports` are taken by others that may not listen there yet. Raises UserError if the stage cannot be started.
    """

    def __init__(
        self,
        stage: Stage,
        place: str,
        study: Study,
        tools: Path | None,
        bars: terminal.ProgressBars,
        cores: int,
        devices: Sequence[str] = (),
        ports: Collection[int] = (),
    ) -> None:
        self.stage, self.place, self.devices = stage, place, devices
        self.port = _free_port(ports)
        self._start = time.monotonic()
        environment = stages.stage_environment(stage, cores, devices)
        command = stages.stage_command(stage, tools, study.launcher, self.port, {**os.environ, **environment})
        self._log_start = _begin_log(stage.log, command, devices)
        self.child = processes.start_process(command, study.directory, stage.label, stage.log, environment)
        self._look = _progress_of(stage)
        self._first = self._look()
        self._bar = bars.add(f"{place} {stage.label}", self._first.total, self._first.done)
        self._shown = time.monotonic()

    def update(self) -> None:
        """Move the bar, from time to time; while a stage is starting, there is nothing to tell."""
        if time.monotonic() - self._shown >= _UPDATE_SECONDS:
            self._shown = time.monotonic()
            progress = self._look()
            if progress != self._first:
                self._bar.update(progress.done, progress.note, progress.total)

    def close(self) -> None:
        self._bar.close()

    def failure(self) -> str:
        """What went wrong with the stage, now that its process has ended; "" if it is done."""
        stage, code = self.stage, self.child.returncode
        if code != 0:
            return f"{stage.label} failed with {_describe(code)}; log: {stage.log}\n{self._tail()}"
        if not status.is_done(stage):
            return (
                f"{stage.label} ended without an error, but is not finished (was it told to stop?); run the same "
                f"command to go on; log: {stage.log}\n{self._tail()}"
            )
        return ""

    def print_result(self) -> None:
        seconds = time.monotonic() - self._start
        terminal.info(
            f"{self.place} {self.stage.label}: {_result(self.stage)} ({terminal.duration(seconds)})"
        )

    def _tail(self) -> str:
        """The last lines of this start that are not noise, indented."""
        with open(self.stage.log, "rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        lines = [line for line in lines if not _NOISE.search(line)][-_TAIL_LINES:]
        return "\n".join(f"  | {line}" for line in lines) or "  (it printed nothing)"


def _free_port(taken: Collection[int]) -> int:
    """For the deepspeed launcher, whose ranks listen there only seconds later."""
    while (port := process_group.free_port()) in taken:
        pass
    return port


def _begin_log(log: Path, command: Sequence[str], devices: Sequence[str]) -> int:
    """Write a header, the command with its devices; returns where this start's part of the log begins."""
    log.parent.mkdir(parents=True, exist_ok=True)
    chosen = f"CUDA_VISIBLE_DEVICES={','.join(devices)} " if devices else ""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"=== {now} {chosen}{shlex.join(command)}\n")
        return file.tell()


def _progress_of(stage: Stage) -> Callable[[], status.Progress]:
    if stage.kind == "train":
        return lambda: status.training_progress(stage.settings)
    if stage.kind == "evaluate":
        return status.EvaluationProgress(stage.settings)
    if stage.kind == "annotate":
        return lambda: status.annotation_progress(stage.settings)
    return lambda: status.Progress(0, 1)


def _result(stage: Stage) -> str:
    """The number of a finished stage that one would look at first."""
    if stage.kind == "train":
        loss = status.final_loss(stage.run.directory) if stage.run else None
        return "trained" if loss is None else f"loss {loss:.3f}"
    if stage.kind == "evaluate":
        return status.accuracy(stage.settings)
    if stage.kind == "report":
        return "done"
    if stage.kind == "annotate":
        facts = atomic_dir.read_manifest(AnnotationDirectory(Path(stage.settings.output_dir)).result)["facts"]
        return "{annotated} problems annotated, {unannotated} not".format(**facts["summary"]["problems"])
    manifest = atomic_dir.read_manifest(Path(stage.settings.output_dir))
    if stage.kind == "prepare":
        return f"{manifest['facts']['num_problems']} problems"
    return terminal.size_text(sum(file["bytes"] for file in manifest["files"].values()))


def _describe(code: int | None) -> str:
    """Launchers pass on the death of a rank by signal n as 128 + n or as 256 - n."""
    code = code or 0
    number = -code if code < 0 else code - 128 if code < 192 else 256 - code if code < 255 else 0
    try:
        name = signal.Signals(number).name
    except ValueError:
        told = {
            EXIT_REQUEUE: ": it was told to stop, and what is done is kept",
            EXIT_PEER_LOST: ": a rank that the others needed is gone",
        }
        return f"exit code {code}{told.get(code, '')}"
    return f"exit code {code} ({name}{': out of memory?' if number == signal.SIGKILL else ''})"
