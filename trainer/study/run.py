"""Do what is not done yet: one stage after the other, each a process of its own with a log of its own."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from trainer import commit, lock, rendezvous, terminal
from trainer.errors import UserError
from trainer.run_directory import AnnotationDirectory
from trainer.study import changes, processes, stages, state
from trainer.study.plan import Study
from trainer.study.stages import Stage

INTERRUPTED = 130
_GRACE_SECONDS = 60.0  # for a training to save after an interrupt
_CLEAN_UP_SECONDS = 5.0  # for the other ranks after a failure
_LOOK_EVERY_SECONDS = 0.05
_SHOW_EVERY_SECONDS = 1.0
_TAIL_LINES = 15
# What launchers and libraries say around an error; the log has it all.
_NOISE = re.compile(r"\[(INFO|WARNING)\]|Killing subprocess|exits with return code|^\s*$|^=== ")


def run(study: Study, tools: Path, keep_going: bool = False) -> int:
    """Run the study; returns the exit status, 0 or 130 (interrupted: the same command goes on).

    `tools` is the folder of the command line tools. Raises UserError if a stage failed; with `keep_going` only after
    everything that does not depend on it.
    """
    changes.refuse(study)
    todo = stages.of_study(study)
    with lock.held(study.directory.lock), processes.Interrupts() as interrupts:
        changes.remember(study)
        _end_leftovers(study, interrupts)
        done = sum(state.is_done(stage) for stage in todo)
        terminal.say(f"study {study.name}: {len(study.runs)} runs, {len(todo)} stages, {done} done")
        if strangers := changes.strangers(study):
            terminal.say(f"not in {study.file}, but in the report while they exist: {', '.join(strangers)}")
        failures: list[str] = []
        broken: set[str] = set()  # labels of stages that failed, and of those that need them
        for number, stage in enumerate(todo, 1):
            failure, place = "", f"[{number}/{len(todo)}]"
            if not interrupts.count and not state.is_done(stage):
                # The report shows what there is.
                if stage.kind != "report" and broken.intersection(stage.needs):
                    broken.add(stage.label)
                    continue
                failure = _do(stage, study, tools, place, interrupts)
            if interrupts.count:
                terminal.say("interrupted; run the same command to go on")
                return INTERRUPTED
            if failure and not keep_going:
                raise UserError(failure)
            if failure:
                terminal.say(f"{place} {failure}")
                failures.append(stage.label)
                broken.add(stage.label)
        if failures:
            raise UserError(f"{len(failures)} of {len(todo)} stages failed: {'; '.join(failures)}")
        for headline in state.headlines(study.directory):
            terminal.say(headline)
        terminal.say(f"report: {study.directory.report / 'index.html'}")
    return 0


def _do(
    stage: Stage,
    study: Study,
    tools: Path,
    place: str,
    interrupts: processes.Interrupts,
) -> str:
    """Run one stage to its end; returns what went wrong, or "". After an interrupt nothing of it is left alive."""
    start = time.monotonic()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    command = stages.command(stage, tools, study.launcher, rendezvous.free_port())
    log_start = _begin_log(stage.log, command)
    environment = stages.environment(stage, cores)
    child = processes.start(command, study.directory, stage.log, environment)
    try:
        code = _watch(child, stage, place, interrupts)
    except BaseException:
        processes.end(study.directory, _GRACE_SECONDS)
        raise
    if code != 0:
        _end(stage, study, interrupts)
        child.poll()
    if interrupts.count:
        return ""
    if code != 0:
        return f"{stage.label} failed with {_describe(code)}; log: {stage.log}\n{_tail(stage.log, log_start)}"
    if not state.is_done(stage):
        return (
            f"{stage.label} ended without an error, but is not finished (was it told to stop?); run the same command "
            f"to go on; log: {stage.log}\n{_tail(stage.log, log_start)}"
        )
    terminal.say(f"{place} {stage.label}: {_result(stage)} ({terminal.duration(time.monotonic() - start)})")
    return ""


def _end(stage: Stage, study: Study, interrupts: processes.Interrupts) -> None:
    """After an interrupt let the stage save and end it; after a failure end what is left of it."""
    told = interrupts.count
    if told:
        terminal.say(f"ending {stage.label}; Ctrl-C once more ends it without saving")
    grace = _GRACE_SECONDS if told else _CLEAN_UP_SECONDS
    for survivor in processes.end(study.directory, grace, lambda: interrupts.count > told):
        terminal.warn(f"process {survivor.pid} cannot be killed; it hangs in the kernel")


def _watch(
    child: subprocess.Popen[bytes],
    stage: Stage,
    place: str,
    interrupts: processes.Interrupts,
) -> int | None:
    """Show how the stage goes until it ends (its exit code) or an interrupt comes (None)."""
    look = _progress_of(stage)
    first = look()
    with terminal.progress(f"{place} {stage.label}", first.total, first.done) as bar:
        shown = time.monotonic()
        while child.poll() is None:
            if interrupts.count:
                return None
            if time.monotonic() - shown >= _SHOW_EVERY_SECONDS:
                shown = time.monotonic()
                progress = look()
                if progress != first:  # while a stage is starting, there is nothing to tell
                    bar.update(progress.done, progress.note, progress.total)
            time.sleep(_LOOK_EVERY_SECONDS)
    return child.returncode


def _progress_of(stage: Stage) -> Callable[[], state.Progress]:
    if stage.kind == "train":
        return lambda: state.training_progress(stage.settings)
    if stage.kind == "evaluate":
        return state.EvaluationProgress(stage.settings)
    if stage.kind == "annotate":
        return lambda: state.annotation_progress(stage.settings)
    return lambda: state.Progress(0, 1)


def _result(stage: Stage) -> str:
    """The number of a finished stage that one would look at first."""
    if stage.kind == "train":
        loss = state.final_loss(stage.run.directory) if stage.run else None
        return "trained" if loss is None else f"loss {loss:.3f}"
    if stage.kind == "evaluate":
        return state.accuracy(stage.settings)
    if stage.kind == "report":
        return "done"
    if stage.kind == "annotate":
        facts = commit.read_manifest(AnnotationDirectory(Path(stage.settings.output_dir)).result)["facts"]
        return "{annotated} problems annotated, {unannotated} not".format(**facts["summary"]["problems"])
    manifest = commit.read_manifest(Path(stage.settings.output_dir))
    if stage.kind == "prepare":
        return f"{manifest['facts']['num_problems']} problems"
    return f"{sum(file['bytes'] for file in manifest['files'].values()) / 1e6:.1f} MB"


def _end_leftovers(study: Study, interrupts: processes.Interrupts) -> None:
    """Ranks of a study that was killed itself still train; two trainings must not write one directory."""
    leftovers = processes.of_study(study.directory)
    if leftovers:
        numbers = ", ".join(str(process.pid) for process in leftovers)
        terminal.say(f"ending processes {numbers}, left over from an earlier start that was killed")
        processes.end(study.directory, _GRACE_SECONDS, lambda: interrupts.count > 0)


def _begin_log(log: Path, command: list[str]) -> int:
    """Write a header; returns where this start's part of the log begins."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"=== {datetime.now().astimezone().isoformat(timespec='seconds')} {shlex.join(command)}\n")
        return file.tell()


def _tail(log: Path, start: int) -> str:
    """The last lines of this start that are not noise, indented."""
    with open(log, "rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    lines = [line for line in lines if not _NOISE.search(line)][-_TAIL_LINES:]
    return "\n".join(f"  | {line}" for line in lines) or "  (it printed nothing)"


def _describe(code: int | None) -> str:
    """Launchers pass on the death of a rank by signal n as 128 + n or as 256 - n."""
    code = code or 0
    number = -code if code < 0 else code - 128 if code < 192 else 256 - code if code < 255 else 0
    try:
        name = signal.Signals(number).name
    except ValueError:
        told = {
            terminal.GO_ON_LATER: ": it was told to stop, and what is done is kept",
            terminal.LOST_OTHERS: ": a rank that the others needed is gone",
        }
        return f"exit code {code}{told.get(code, '')}"
    return f"exit code {code} ({name}{': out of memory?' if number == signal.SIGKILL else ''})"
