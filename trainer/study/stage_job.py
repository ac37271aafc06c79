"""A running stage: its process, progress bar, log and result."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from pathlib import Path

from trainer.runtime import process_group, terminal
from trainer.runtime.exit_codes import EXIT_PEER_LOST, EXIT_REQUEUE
from trainer.storage import atomic_dir
from trainer.storage.run_directory import AnnotationDirectory
from trainer.study import processes, stages, status
from trainer.study.fork_server import ForkedStage, ForkServer
from trainer.study.stages import Stage
from trainer.study.study_file import Study

_TAIL_LINES = 15
# Lines that launchers and libraries print around an error. Error messages of stages leave these lines out.
_NOISE = re.compile(r"\[(INFO|WARNING)\]|Killing subprocess|exits with return code|^\s*$|^=== ")


class StageJob:
    """A started stage. Raises UserError if the stage cannot be started.

    `num_cores`: number of CPU cores for this stage. `server`: server for stages of one process, if there is one. `devices`:
    CUDA devices for this stage. `ports_in_use`: ports of the running stages; this stage must use another port.
    """

    def __init__(
        self,
        stage: Stage,
        study: Study,
        scripts_dir: Path | None,
        bars: terminal.ProgressBars,
        num_cores: int,
        server: ForkServer | None = None,
        devices: Sequence[str] = (),
        ports_in_use: Collection[int] = (),
    ) -> None:
        self.stage, self.devices = stage, devices
        # The port of a stage that has just started still looks free, because its ranks need seconds to bind the port.
        while (port := process_group.free_port()) in ports_in_use:
            pass
        self.port = port
        self._start = time.monotonic()
        environment = stages.stage_environment(stage, num_cores, devices)
        command = stages.stage_command(stage, scripts_dir, study.launcher, port, os.environ | environment)
        self._log_offset = _begin_log(stage.log, command, devices)
        self.child: subprocess.Popen[bytes] | ForkedStage
        if server and stage.kind in stages.FORKED_KINDS and command[0] == sys.executable:
            self.child = server.start(command[1:], stage.label, stage.log, environment)
        else:
            self.child = processes.start_process(
                command, study.directory, stage.label, stage.log, environment
            )
        self._read_progress = _progress_of(stage)
        self._initial = self._progress = self._read_progress()
        self._bar = bars.add(stage.label, self._initial.total, self._initial.done, prints_lines=False)

    @property
    def seconds(self) -> float:
        """Time since the start of the stage."""
        return time.monotonic() - self._start

    @property
    def is_resumed(self) -> bool:
        return self._initial.done > 0

    def update(self) -> None:
        """Read the progress of the stage, and update the bar if there was progress."""
        self._progress = self._read_progress()
        if self._progress != self._initial:
            self._bar.update(self._progress.done, self._progress.note, self._progress.total)

    def seconds_left(self, predicted: float | None) -> float | None:
        """Return the time left: from the progress if a tenth is done, else from the `predicted` duration of the stage."""
        new, total = self._progress.done - self._initial.done, self._progress.total - self._initial.done
        if total > 0 and new >= 0.1 * total:
            return self.seconds * (total - new) / new
        return None if predicted is None else max(0.0, predicted - self.seconds)

    def close(self) -> None:
        self._bar.close()

    def __str__(self) -> str:
        progress = self._progress
        counts = f" {progress.done}/{progress.total}" if progress.done and progress.total else ""
        return f"{self.stage.label}{counts}"

    def failure(self) -> str:
        """Return an error message, or "" if the stage is done. Must be called after the process has ended."""
        stage, code = self.stage, self.child.returncode
        assert code is not None
        if code != 0:
            return f"{stage.label} failed with {_exit_text(code)}; log: {stage.log}\n{self._tail()}"
        if not status.is_done(stage):
            return (
                f"{stage.label} ended without an error, but is not finished (was it stopped?); run the same "
                f"command to continue; log: {stage.log}\n{self._tail()}"
            )
        return ""

    def result(self) -> str:
        """Return the stage's label, result and duration as text. The stage must be done."""
        return f"{self.stage.label}: {_result(self.stage)} ({terminal.duration_text(self.seconds)})"

    def _tail(self) -> str:
        """Return the last lines that the stage's process has written to the log, indented, without lines of `_NOISE`."""
        with open(self.stage.log, "rb") as file:
            file.seek(self._log_offset)
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        lines = [line for line in lines if not _NOISE.search(line)][-_TAIL_LINES:]
        return "\n".join(f"  | {line}" for line in lines) or "  (it printed nothing)"


def _begin_log(log: Path, command: Sequence[str], devices: Sequence[str]) -> int:
    """Append a header with the command and its devices to the log. Return the offset at which the output begins."""
    log.parent.mkdir(parents=True, exist_ok=True)
    variable = f"CUDA_VISIBLE_DEVICES={','.join(devices)} " if devices else ""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"=== {now} {variable}{shlex.join(command)}\n")
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
    """Return the result of a finished stage as text: loss, accuracy, number of problems, or size of the files."""
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


def _exit_text(code: int) -> str:
    """Return an exit code and its meaning as text. Launchers report a rank killed by signal n as 128 + n or as 256 - n."""
    number = -code if code < 0 else code - 128 if code < 192 else 256 - code if code < 255 else 0
    if number in list(signal.Signals):
        out_of_memory = ": out of memory?" if number == signal.SIGKILL else ""
        return f"exit code {code} ({signal.Signals(number).name}{out_of_memory})"
    meanings = {
        EXIT_REQUEUE: ": stopped on request, finished work is kept",
        EXIT_PEER_LOST: ": another rank was lost",
    }
    return f"exit code {code}{meanings.get(code, '')}"
