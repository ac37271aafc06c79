"""Show the logs of a study's jobs, and cancel the jobs."""

from __future__ import annotations

from pathlib import Path

from trainer.cluster import slurm, submit, submitted_jobs
from trainer.errors import UserError
from trainer.runtime import terminal
from trainer.storage.configuration import did_you_mean
from trainer.study import stages
from trainer.study.stages import Stage
from trainer.study.study_file import Study

_TAIL_LINES = 30


def cancel(study: Study) -> None:
    """Cancel every pending or running job of the study. A running training gets SIGTERM and saves."""
    live = submit.live_jobs(study.directory)
    if live:
        slurm.cancel(sorted({str(job) for job in live.values()}))
    terminal.info(f"study {study.name}: {len(live)} jobs cancelled; finished stages are kept")


def show_logs(study: Study, name: str) -> None:
    """Print the end of every log of a run, a shard set or `report`. Raises UserError if there is no such name."""
    chosen = [
        stage for stage in stages.study_stages(study) if name in (stage.subject, stage.label, stage.kind)
    ]
    if not chosen:
        names = list(dict.fromkeys(stage.subject for stage in stages.study_stages(study)))
        raise UserError(
            f"study {study.name} has no run {name!r}{did_you_mean(name, names)}; it has {', '.join(names)}"
        )
    known = submitted_jobs.read_jobs(study.directory)
    for stage in chosen:
        _show(stage.log, stage)
        if stage.label in known:
            _show(Path(known[stage.label].output), stage)


def _show(log: Path, stage: Stage) -> None:
    """Print the end of a log, unless it is missing or empty."""
    if log.is_file() and log.stat().st_size:
        end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        terminal.info(f"--- {stage.label}: {log}")
        for line in end:
            terminal.info(line)
