"""Status table of a study's jobs, from Slurm and from the files on disk.

Without accounting (sacct), Slurm lists an ended job for a few minutes only. Later, only the run directories show its state.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from trainer.cluster import slurm, submitted_jobs
from trainer.cluster.slurm import JobState
from trainer.cluster.submitted_jobs import SubmittedJob
from trainer.runtime import restarts, terminal
from trainer.storage import atomic_dir
from trainer.storage.run_directory import EvaluationDirectory, RunDirectory
from trainer.study import stages, status
from trainer.study.stages import Stage
from trainer.study.study_file import Study
from trainer.study.table import make_table

_ETA_STEPS = 20
_TAIL_BYTES = 16 << 10
_HEADER = re.compile(r"^=== .* job .*\brestart \d+$")


class StageStatus(NamedTuple):
    """State of a stage and of its job."""

    label: str
    state: str  # done, pending, failed, not submitted, or the job's state in lower case, e.g. running
    job: str  # job id; "" if the stage was not submitted
    note: str  # progress, or why the job is pending or failed


def print_status(study: Study) -> None:
    """Print the number of stages in each state, and every submitted stage that is not done."""
    submitted = submitted_jobs.read_jobs(study.directory)
    jobs = slurm.jobs([job.job for job in submitted.values()]) if submitted else {}
    todo = stages.study_stages(study)
    statuses = [_stage_status(stage, submitted.get(stage.label), jobs) for stage in todo]
    table = make_table("stage", "state", "job", "")
    for stage_status in statuses:
        if stage_status.state not in ("done", "not submitted"):
            table.add_row(*stage_status)
    counts = Counter(stage_status.state for stage_status in statuses)
    counts_text = ", ".join(f"{count} {name}" for name, count in counts.items())
    terminal.info(f"jobs of study {study.name}: {counts_text}")
    if table.row_count:
        terminal.info(terminal.table_text(table))
    if counts["failed"]:
        terminal.info(f"submit what failed again: tools/study.py resubmit {study.file} --failed")


def _stage_status(stage: Stage, submitted: SubmittedJob | None, jobs: Mapping[str, JobState]) -> StageStatus:
    job = jobs.get(submitted.job) if submitted else None
    name, requeued = submitted.job if submitted else "", _requeued_text(stage, job)
    if submitted is None or job is None or not job.is_live:
        if status.is_done(stage):
            return StageStatus(stage.label, "done", name, requeued)
        if submitted is None:
            return StageStatus(stage.label, "not submitted", "", "")
        note = _join(_failure_text(stage, submitted, job), requeued)
        return StageStatus(stage.label, "failed", name, note)
    if job.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        return StageStatus(stage.label, "pending", name, _join(_readable(job.reason), requeued))
    note = _join(progress_text(stage), requeued, f"on {job.nodes}" if job.nodes else "")
    return StageStatus(stage.label, job.state.lower(), name, note)


def progress_text(stage: Stage) -> str:
    """Return progress of a training (step, loss, tokens/s, time left) or evaluation (solved problems), or "" if unknown."""
    if stage.kind == "train":
        progress = status.training_progress(stage.settings)
        if not progress.done:
            return "starting"
        last = status.last_steps(RunDirectory(Path(stage.settings.output_dir)).metrics)[-_ETA_STEPS:]
        seconds = [step["seconds"] for step in last if isinstance(step.get("seconds"), (int, float))]
        speed = last[-1].get("tokens_per_second")
        per_second = f"{speed:,.0f} tokens/s" if isinstance(speed, (int, float)) else ""
        left = ""
        if seconds and progress.total:
            remaining = (progress.total - progress.done) * sum(seconds) / len(seconds)
            left = f"{terminal.duration_text(remaining)} left"
        return _join(f"step {progress.done}/{progress.total or '?'}", progress.note, per_second, left)
    if stage.kind == "evaluate" and atomic_dir.is_complete(Path(stage.settings.shards)):
        solved = status.EvaluationProgress(stage.settings)()
        return f"{solved.done}/{solved.total} problems"
    return ""


def _requeued_text(stage: Stage, job: JobState | None) -> str:
    """Return "requeued N times", or "" if N is 0. N is the larger of Slurm's count and the count in the restart file."""
    count = job.restarts if job is not None and job.restarts is not None else 0
    if stage.kind in ("train", "evaluate"):
        directory = RunDirectory if stage.kind == "train" else EvaluationDirectory
        file = directory(Path(stage.settings.output_dir)).restarts
        count = max(count, restarts.read_restarts(file)["restarts"])
    return f"requeued {count} time{'s' if count > 1 else ''}" if count else ""


def _failure_text(stage: Stage, submitted: SubmittedJob, job: JobState | None) -> str:
    """Return the job's state, reason and exit code, and the last error in the logs.

    If the logs are missing or empty, the path of the stage's log replaces the error.
    """
    state = "ended without a result"
    if job is not None:
        code = slurm.exit_code(submitted.job)
        code_text = f"exit code {code.partition(':')[0]}" if code not in ("", "0:0") else ""
        state = _join(_readable(job.state), _readable(job.reason), code_text)
        if job.state == "CANCELLED" and not Path(submitted.output).exists():
            return _join(state, "before it started: cancelled, or a job it depends on has failed")
    error = last_error(stage.log) or last_error(Path(submitted.output))
    return _join(state, error or f"see {stage.log}")


def last_error(log: Path) -> str:
    """Return the last `error:` line after the job's last start. If there is no such line, return the last line, or ""."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    starts = [number for number, line in enumerate(lines) if _HEADER.match(line)]
    lines = [line.strip() for line in lines[starts[-1] + 1 if starts else 0 :] if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1]


def _readable(text: str) -> str:
    """Return a state or reason of Slurm in lower case, e.g. "node fail" for NODE_FAIL; keep mixed case, e.g. BeginTime."""
    return text.lower().replace("_", " ") if text.isupper() or "_" in text else text


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
