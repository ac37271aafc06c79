"""A study on a cluster as a table: what Slurm says of every job, joined with what is on disk.

Slurm forgets ended jobs after minutes unless it keeps accounts (sacct); then the run directories alone tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.cluster import slurm, submitted_jobs
from trainer.cluster.slurm import JobState
from trainer.cluster.submitted_jobs import SubmittedJob
from trainer.runtime import restarts, terminal
from trainer.storage import atomic_dir
from trainer.storage.run_directory import EvaluationDirectory, RunDirectory
from trainer.study import stages, status
from trainer.study.stages import Stage
from trainer.study.study_file import Study
from trainer.study.table import make_table, table_text

_STEPS_OF_ETA = 20
_TAIL_BYTES = 16 << 10
_HEADER = re.compile(r"^=== .* job .*\brestart \d+$")


@dataclass(frozen=True)
class StageStatus:
    """One stage: its label, `done`, `running`, `pending`, `failed` or `not submitted`, its job, and how it goes or why not."""

    label: str
    state: str
    job: str
    note: str


def print_status(study: Study) -> None:
    """Print every submitted stage that is not done, and how many are."""
    found = stage_statuses(study)
    table = make_table("stage", "state", "job", "")
    for line in found:
        if line.state not in ("done", "not submitted"):
            table.add_row(line.label, line.state, line.job, line.note)
    counts = {
        name: sum(line.state == name for line in found)
        for name in dict.fromkeys(line.state for line in found)
    }
    terminal.info(
        f"jobs of study {study.name}: {', '.join(f'{count} {name}' for name, count in counts.items())}"
    )
    if table.row_count:
        terminal.info(table_text(table))
    if counts.get("failed"):
        terminal.info(f"submit what failed again: tools/study.py resubmit {study.file} --failed")


def stage_statuses(study: Study) -> list[StageStatus]:
    """How far every stage is."""
    known = submitted_jobs.read_jobs(study.directory)
    jobs = slurm.jobs([job.job for job in known.values()]) if known else {}
    return [_line(stage, known.get(stage.label), jobs) for stage in stages.study_stages(study)]


def _line(stage: Stage, submitted: SubmittedJob | None, jobs: Mapping[str, JobState]) -> StageStatus:
    job = jobs.get(submitted.job) if submitted else None
    name = submitted.job if submitted else ""
    if submitted is None or job is None or not job.is_live:
        if status.is_done(stage):
            return StageStatus(stage.label, "done", name, _join(_restarted(stage, job)))
        if submitted is None:
            return StageStatus(stage.label, "not submitted", "", "")
        return StageStatus(
            stage.label, "failed", name, _join(_why(stage, submitted, job), _restarted(stage, job))
        )
    if job.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        return StageStatus(stage.label, "pending", name, _join(_words(job.reason), _restarted(stage, job)))
    note = _join(progress_text(stage), _restarted(stage, job), f"on {job.nodes}" if job.nodes else "")
    return StageStatus(stage.label, job.state.lower(), name, note)


def progress_text(stage: Stage) -> str:
    """Step, loss, tokens/s and time left of a training; problems solved of an evaluation."""
    if stage.kind == "train":
        progress = status.training_progress(stage.settings)
        if not progress.done:
            return "starting"
        last = status.last_steps(RunDirectory(Path(stage.settings.output_dir)).metrics)[-_STEPS_OF_ETA:]
        seconds = [step["seconds"] for step in last if isinstance(step.get("seconds"), (int, float))]
        speed = last[-1].get("tokens_per_second")
        per_second = f"{speed:,.0f} tokens/s" if isinstance(speed, (int, float)) else ""
        left = ""
        if seconds and progress.total:
            remaining = (progress.total - progress.done) * sum(seconds) / len(seconds)
            left = f"{terminal.duration(remaining)} left"
        return _join(f"step {progress.done}/{progress.total or '?'}", progress.note, per_second, left)
    if stage.kind == "evaluate" and atomic_dir.is_complete(Path(stage.settings.shards)):
        solved = status.EvaluationProgress(stage.settings)()
        return f"{solved.done}/{solved.total} problems"
    return ""


def _restarted(stage: Stage, job: JobState | None) -> str:
    """How often Slurm started it again, from Slurm or from what the run wrote down."""
    count = job.restarts if job is not None and job.restarts is not None else 0
    if stage.kind == "train":
        count = max(count, restarts.read(RunDirectory(Path(stage.settings.output_dir)).restarts)["restarts"])
    elif stage.kind == "evaluate":
        file = EvaluationDirectory(Path(stage.settings.output_dir)).restarts
        count = max(count, restarts.read(file)["restarts"])
    return f"requeued {count} time{'s' if count > 1 else ''}" if count else ""


def _why(stage: Stage, submitted: SubmittedJob, job: JobState | None) -> str:
    """Slurm's state and exit code, and the last error in the logs."""
    what = "ended without a result"
    if job is not None:
        code = slurm.exit_code(submitted.job)
        of_code = f"exit code {code.partition(':')[0]}" if code not in ("", "0:0") else ""
        what = _join(_words(job.state), _words(job.reason), of_code)
        if job.state == "CANCELLED" and not Path(submitted.output).exists():
            return _join(what, "before it started: cancelled, or what it needs has failed")
    error = last_error(stage.log) or last_error(Path(submitted.output))
    return _join(what, error or f"see {stage.log}")


def last_error(log: Path) -> str:
    """The last `error:` line that the last start wrote, else its last line; "" without a log."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            written = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    starts = [number for number, line in enumerate(written) if _HEADER.match(line)]
    written = [line.strip() for line in written[starts[-1] + 1 if starts else 0 :] if line.strip()]
    errors = [line for line in written if line.startswith("error:")]
    return (errors or written or [""])[-1]


def _words(text: str) -> str:
    """NODE_FAIL -> node fail; BeginTime, Dependency and other words of Slurm's stay."""
    return text.lower().replace("_", " ") if text.isupper() or "_" in text else text


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
