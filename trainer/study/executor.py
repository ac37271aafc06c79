"""Run the stages of a study that are not done, one or several at a time. Each stage is a process with its own log."""

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import UserError
from trainer.runtime import directory_lock, terminal
from trainer.runtime.exit_codes import EXIT_INTERRUPTED
from trainer.study import changes, fork_server, processes, stage_queue, stages, status
from trainer.study.processes import Interrupts
from trainer.study.progress import StudyProgress
from trainer.study.stage_job import StageJob
from trainer.study.stage_queue import StageQueue
from trainer.study.stages import Stage
from trainer.study.study_file import Study

_GRACE_SECONDS = 60.0  # time between SIGTERM and SIGKILL, in which a training can save a checkpoint
_CLEAN_UP_SECONDS = 5.0  # after a failure, time until the remaining ranks are killed
_POLL_SECONDS = 0.05


def run_study(study: Study, scripts_dir: Path | None, keep_going: bool = False) -> int:
    """Run the study. Return 0, or EXIT_INTERRUPTED after an interrupt. Raises UserError at the end if a stage failed.

    `scripts_dir`: folder of the command-line scripts; None for the installed modules. After a failure, no stage is started.
    With `keep_going`, the report and all stages that do not depend on a failed stage are still started.
    """
    changes.check_unchanged(study)
    todo = stages.study_stages(study)
    with directory_lock.locked(study.directory.lock), Interrupts() as interrupts:
        changes.save_snapshot(study)
        if leftovers := processes.processes_of_study(study.directory):
            # Ranks can outlive a killed study, and two trainings must not write to one directory.
            pids = ", ".join(str(process.pid) for process in leftovers)
            terminal.info(f"ending processes {pids}, left over from an earlier start that was killed")
            _end_processes(study, _GRACE_SECONDS, interrupts)
        done = [stage for stage in todo if status.is_done(stage)]
        parallel = f", {study.num_parallel} at a time" if study.num_parallel > 1 else ""
        terminal.info(
            f"study {study.name}: {len(study.runs)} runs, {len(todo)} stages, {len(done)} done{parallel}"
        )
        if unlisted := changes.unlisted_runs(study):
            terminal.info(f"not in {study.file}, but in the report while they exist: {', '.join(unlisted)}")
        failures = _run_stages(todo, done, study, scripts_dir, keep_going, interrupts)
        if interrupts.count:
            terminal.info(terminal.INTERRUPTED)
            return EXIT_INTERRUPTED
        if failures and not keep_going:
            raise UserError("\n".join(failures.values()))
        if failures:
            raise UserError(f"{len(failures)} of {len(todo)} stages failed: {'; '.join(failures)}")
        for line in (*status.headlines(study.directory), f"report: {study.directory.report / 'index.html'}"):
            terminal.info(line)
    return 0


def _run_stages(
    todo: Sequence[Stage],
    done: Sequence[Stage],
    study: Study,
    scripts_dir: Path | None,
    keep_going: bool,
    interrupts: Interrupts,
) -> dict[str, str]:
    """Run the stages that are not done. Return {label of a failed stage: message}. An interrupt ends all processes."""
    queue = StageQueue(todo, done)
    num_cores = len(os.sched_getaffinity(0))
    cores_per_stage = num_cores // study.num_parallel
    visible = stage_queue.visible_devices(os.environ)
    # Without GPUs, the ranks of all stages that run at the same time share the cores.
    max_ranks = sys.maxsize if visible else max(num_cores, study.num_parallel)
    num_forked = sum(stage.kind in stages.FORKED_KINDS and stage.num_ranks == 1 for stage in queue.waiting)
    server = None
    if not visible and num_forked >= fork_server.MIN_STAGES:
        server = fork_server.ForkServer(study.directory, max(1, cores_per_stage))
    running: list[StageJob] = []
    failures: dict[str, str] = {}
    num_done = len(todo) - len(queue.waiting)
    progress = StudyProgress(len(todo), num_done, study.num_parallel, max_ranks)
    try:
        with contextlib.closing(progress):
            while not interrupts.count:
                may_start = (keep_going or not failures) and len(running) < study.num_parallel
                free = max_ranks - sum(job.stage.num_ranks for job in running) if running else sys.maxsize
                if may_start and (stage := queue.pop_ready(free)):
                    count = stage.num_ranks if stage.kind in stages.ON_DEVICES else 0
                    shared = visible if study.num_parallel > 1 else ()
                    devices = stage_queue.least_used_devices(shared, [job.devices for job in running], count)
                    ports = {job.port for job in running}
                    job = StageJob(
                        stage, study, scripts_dir, progress.bars, cores_per_stage, server, devices, ports
                    )
                    running.append(job)
                elif not running:
                    break
                elif ended := next((job for job in running if job.child.poll() is not None), None):
                    running.remove(ended)
                    ended.close()
                    progress.record(ended)
                    if ended.child.returncode != 0:
                        _end_processes(study, _CLEAN_UP_SECONDS, interrupts, stage=ended.stage.label)
                    counter = f"[{progress.num_ended}/{len(todo)}]"
                    failure = "" if interrupts.count else _report_ended(ended, counter, running, keep_going)
                    if failure:
                        failures[ended.stage.label] = failure
                    queue.mark_ended(ended.stage, succeeded=not failure)
                else:
                    progress.update(queue.waiting, running)
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


def _report_ended(ended: StageJob, counter: str, running: Sequence[StageJob], keep_going: bool) -> str:
    """Print the result of a stage that has ended. Return the failure message, or "" if the stage succeeded.

    `counter`: number of ended stages, e.g. "[3/12]".
    """
    failure = ended.failure()
    if not failure:
        terminal.info(f"{counter} {ended.result()}")
    elif keep_going or running:  # otherwise run_study raises UserError with this message at once
        terminal.info(f"{counter} {failure}")
        if not keep_going:
            terminal.info(f"nothing new is started; waiting for {_labels(running)}")
    return failure


def _end_processes(
    study: Study, grace_seconds: float, interrupts: Interrupts, ignored: int = 0, stage: str | None = None
) -> None:
    """End the processes of the study, or only the processes of `stage` if it is not None.

    Remaining processes are killed after `grace_seconds`, or when there have been more than `ignored` interrupts.
    """
    for survivor in processes.end_processes(
        study.directory, grace_seconds, lambda: interrupts.count > ignored, stage
    ):
        terminal.warning(f"process {survivor.pid} cannot be killed; it hangs in the kernel")


def _labels(running: Sequence[StageJob]) -> str:
    return ", ".join(job.stage.label for job in running)
