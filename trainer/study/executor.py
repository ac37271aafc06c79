"""Run the stages of a study that are not done: one or several at a time, each a process with its own log."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import UserError
from trainer.runtime import directory_lock, terminal
from trainer.runtime.exit_codes import EXIT_INTERRUPTED
from trainer.study import changes, processes, stage_queue, stages, status
from trainer.study.stage_job import StageJob
from trainer.study.stage_queue import StageQueue
from trainer.study.stages import Stage
from trainer.study.study_file import Study

_GRACE_SECONDS = 60.0  # for a training to save after an interrupt
_CLEAN_UP_SECONDS = 5.0  # for the remaining ranks after a failure
_POLL_SECONDS = 0.05


def run_study(study: Study, tools: Path | None, keep_going: bool = False) -> int:
    """Run the study and return the exit status: 0, or EXIT_INTERRUPTED (the same command continues it).

    `tools`: folder of the command line tools; None: the installed modules. Raises UserError if a stage failed, after the
    running stages have ended; with `keep_going`, after all stages that do not depend on it.
    """
    changes.check_unchanged(study)
    todo = stages.study_stages(study)
    with directory_lock.locked(study.directory.lock), processes.Interrupts() as interrupts:
        changes.save_snapshot(study)
        if leftovers := processes.processes_of_study(study.directory):
            # Ranks that outlived a killed study: two trainings must not write to one directory.
            numbers = ", ".join(str(process.pid) for process in leftovers)
            terminal.info(f"ending processes {numbers}, left over from an earlier start that was killed")
            _end_processes(study, _GRACE_SECONDS, interrupts)
        done = [stage for stage in todo if status.is_done(stage)]
        parallel = f", {study.num_parallel} at a time" if study.num_parallel > 1 else ""
        terminal.info(
            f"study {study.name}: {len(study.runs)} runs, {len(todo)} stages, {len(done)} done{parallel}"
        )
        if unlisted := changes.unlisted_runs(study):
            terminal.info(f"not in {study.file}, but in the report while they exist: {', '.join(unlisted)}")
        failures = _run_stages(todo, done, study, tools, keep_going, interrupts)
        if interrupts.count:
            terminal.info("interrupted; run the same command to continue")
            return EXIT_INTERRUPTED
        if failures and not keep_going:
            raise UserError("\n".join(failures.values()))
        if failures:
            raise UserError(f"{len(failures)} of {len(todo)} stages failed: {'; '.join(failures)}")
        for headline in status.headlines(study.directory):
            terminal.info(headline)
        terminal.info(f"report: {study.directory.report / 'index.html'}")
    return 0


def _run_stages(
    todo: Sequence[Stage],
    done: Sequence[Stage],
    study: Study,
    tools: Path | None,
    keep_going: bool,
    interrupts: processes.Interrupts,
) -> dict[str, str]:
    """Run all stages that can run, up to `num_parallel` at a time; return failure messages by stage label.

    After an interrupt no process of the study is left alive.
    """
    queue = StageQueue(todo, done)
    positions = {stage.label: f"[{number}/{len(todo)}]" for number, stage in enumerate(todo, 1)}
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = num_cores // study.num_parallel
    visible = stage_queue.visible_devices(os.environ) if study.num_parallel > 1 else ()
    running: list[StageJob] = []
    failures: dict[str, str] = {}
    try:
        with contextlib.closing(terminal.ProgressBars()) as bars:
            while not interrupts.count:
                may_start = (keep_going or not failures) and len(running) < study.num_parallel
                if may_start and (stage := queue.take_ready()):
                    count = stage.num_ranks if stage.kind in stages.ON_DEVICES else 0
                    used = [job.devices for job in running]
                    chosen = stage_queue.least_used_devices(visible, used, count)
                    ports = {job.port for job in running}
                    running.append(
                        StageJob(stage, positions[stage.label], study, tools, bars, cores, chosen, ports)
                    )
                elif not running:
                    break
                elif ended := next((job for job in running if job.child.poll() is not None), None):
                    running.remove(ended)
                    ended.close()
                    if ended.child.returncode != 0:  # end the remaining processes of this stage only
                        _end_processes(study, _CLEAN_UP_SECONDS, interrupts, stage=ended.stage.label)
                    failure = "" if interrupts.count else _report_ended(ended, running, keep_going)
                    if failure:
                        failures[ended.stage.label] = failure
                    queue.mark_ended(ended.stage, succeeded=not failure)
                else:
                    for job in running:
                        job.update()
                    time.sleep(_POLL_SECONDS)
        if running:
            them = "it" if len(running) == 1 else "them"
            terminal.info(f"ending {_labels(running)}; Ctrl-C once more ends {them} without saving")
            _end_processes(study, _GRACE_SECONDS, interrupts, ignored=interrupts.count)
            for job in running:
                job.child.poll()
    except BaseException:
        processes.end_processes(study.directory, _GRACE_SECONDS)
        raise
    return failures


def _report_ended(ended: StageJob, running: Sequence[StageJob], keep_going: bool) -> str:
    """Print the result of a stage that ended and return its failure message, or "".

    A failure is not printed if the study stops with it immediately: the UserError then contains it.
    """
    failure = ended.failure()
    if not failure:
        ended.print_result()
    elif keep_going or running:
        terminal.info(f"{ended.position} {failure}")
        if not keep_going:
            terminal.info(f"nothing new is started; waiting for {_labels(running)}")
    return failure


def _end_processes(
    study: Study,
    grace_seconds: float,
    interrupts: processes.Interrupts,
    ignored: int = 0,
    stage: str | None = None,
) -> None:
    """End the processes of the study, or of one stage; kill them after more interrupts than the `ignored` ones."""
    survivors = processes.end_processes(
        study.directory, grace_seconds, lambda: interrupts.count > ignored, stage
    )
    for survivor in survivors:
        terminal.warning(f"process {survivor.pid} cannot be killed; it hangs in the kernel")


def _labels(running: Sequence[StageJob]) -> str:
    return ", ".join(job.stage.label for job in running)
