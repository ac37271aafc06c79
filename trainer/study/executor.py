"""Do what is not done yet: every stage a process of its own with a log of its own, one or several at the same time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from trainer.errors import UserError
from trainer.runtime import directory_lock, terminal
from trainer.runtime.exit_codes import EXIT_INTERRUPTED
from trainer.study import changes, devices, processes, stages, status
from trainer.study.stage_job import StageJob
from trainer.study.stage_queue import StageQueue
from trainer.study.stages import Stage
from trainer.study.study_file import Study

_GRACE_SECONDS = 60.0  # for a training to save after an interrupt
_CLEAN_UP_SECONDS = 5.0  # for the other ranks after a failure
_POLL_SECONDS = 0.05


def run_study(study: Study, tools: Path | None, keep_going: bool = False) -> int:
    """Run the study; returns the exit status, 0 or 130 (interrupted: the same command goes on).

    `tools` is the folder of the command line tools, None: the installed modules. Raises UserError if a stage failed, after those that ran beside it
    have ended; with `keep_going` only after everything that does not depend on it.
    """
    changes.check_unchanged(study)
    todo = stages.study_stages(study)
    with directory_lock.locked(study.directory.lock), processes.Interrupts() as interrupts:
        changes.save_snapshot(study)
        _end_leftovers(study, interrupts)
        done = [stage for stage in todo if status.is_done(stage)]
        beside = f", {study.num_parallel} at a time" if study.num_parallel > 1 else ""
        terminal.info(
            f"study {study.name}: {len(study.runs)} runs, {len(todo)} stages, {len(done)} done{beside}"
        )
        if strangers := changes.unlisted_runs(study):
            terminal.info(f"not in {study.file}, but in the report while they exist: {', '.join(strangers)}")
        failures = _do(todo, done, study, tools, keep_going, interrupts)
        if interrupts.count:
            terminal.info("interrupted; run the same command to go on")
            return EXIT_INTERRUPTED
        if failures and not keep_going:
            raise UserError("\n".join(failures.values()))
        if failures:
            raise UserError(f"{len(failures)} of {len(todo)} stages failed: {'; '.join(failures)}")
        for headline in status.headlines(study.directory):
            terminal.info(headline)
        terminal.info(f"report: {study.directory.report / 'index.html'}")
    return 0


def _do(
    todo: Sequence[Stage],
    done: Sequence[Stage],
    study: Study,
    tools: Path | None,
    keep_going: bool,
    interrupts: processes.Interrupts,
) -> dict[str, str]:
    """Do all that can be done, up to `num_parallel` stages at the same time; returns what went wrong, by label.

    After an interrupt nothing of the study is left alive.
    """
    schedule = StageQueue(todo, done)
    places = {stage.label: f"[{number}/{len(todo)}]" for number, stage in enumerate(todo, 1)}
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = num_cores // study.num_parallel
    visible = devices.visible_devices(os.environ) if study.num_parallel > 1 else ()
    running: list[StageJob] = []
    failures: dict[str, str] = {}
    try:
        with contextlib.closing(terminal.ProgressBars()) as bars:
            while not interrupts.count:
                may_start = (keep_going or not failures) and len(running) < study.num_parallel
                if may_start and (stage := schedule.take_ready()):
                    count = stage.num_ranks if stage.kind in stages.ON_DEVICES else 0
                    chosen = devices.least_used_devices(visible, [other.devices for other in running], count)
                    ports = {other.port for other in running}
                    running.append(
                        StageJob(stage, places[stage.label], study, tools, bars, cores, chosen, ports)
                    )
                elif not running:
                    break
                elif ended := next((one for one in running if one.child.poll() is not None), None):
                    running.remove(ended)
                    _clean_up(ended, study, interrupts)
                    failure = "" if interrupts.count else _report_ended(ended, running, keep_going)
                    if failure:
                        failures[ended.stage.label] = failure
                    schedule.mark_ended(ended.stage, well=not failure)
                else:
                    for one in running:
                        one.update()
                    time.sleep(_POLL_SECONDS)
        if running:
            _interrupt(running, study, interrupts)
    except BaseException:
        processes.end_processes(study.directory, _GRACE_SECONDS)
        raise
    return failures


def _report_ended(ended: StageJob, running: Sequence[StageJob], keep_going: bool) -> str:
    """Say what became of a stage; returns what went wrong, or "". A failure that ends the study at once is the error's to tell."""
    failure = ended.failure()
    if not failure:
        ended.print_result()
    elif keep_going or running:
        terminal.info(f"{ended.place} {failure}")
        if not keep_going:
            terminal.info(f"nothing new is started; waiting for {_labels(running)}")
    return failure


def _clean_up(ended: StageJob, study: Study, interrupts: processes.Interrupts) -> None:
    """After a failure end what is left of the stage, and of no other."""
    ended.close()
    if ended.child.returncode != 0:
        label = ended.stage.label
        _warn(
            processes.end_processes(study.directory, _CLEAN_UP_SECONDS, lambda: interrupts.count > 0, label)
        )


def _interrupt(running: Sequence[StageJob], study: Study, interrupts: processes.Interrupts) -> None:
    """Let all stages that run save, and end them."""
    told = interrupts.count
    it = "it" if len(running) == 1 else "them"
    terminal.info(f"ending {_labels(running)}; Ctrl-C once more ends {it} without saving")
    _warn(processes.end_processes(study.directory, _GRACE_SECONDS, lambda: interrupts.count > told))
    for one in running:
        one.child.poll()


def _warn(survivors: Sequence[psutil.Process]) -> None:
    for survivor in survivors:
        terminal.warning(f"process {survivor.pid} cannot be killed; it hangs in the kernel")


def _labels(running: Sequence[StageJob]) -> str:
    return ", ".join(one.stage.label for one in running)


def _end_leftovers(study: Study, interrupts: processes.Interrupts) -> None:
    """Ranks of a study that was killed itself still train; two trainings must not write one directory."""
    leftovers = processes.processes_of_study(study.directory)
    if leftovers:
        numbers = ", ".join(str(process.pid) for process in leftovers)
        terminal.info(f"ending processes {numbers}, left over from an earlier start that was killed")
        processes.end_processes(study.directory, _GRACE_SECONDS, lambda: interrupts.count > 0)
