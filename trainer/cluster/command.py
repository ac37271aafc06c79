"""Subcommands of tools/study.py except `run`: status, submit, resubmit, logs and cancel."""

from pathlib import Path

from trainer.cluster import slurm, status, submit, submitted_jobs
from trainer.errors import UserError
from trainer.runtime import terminal
from trainer.storage.configuration import did_you_mean
from trainer.study import stages, table
from trainer.study.study_file import Study

_TAIL_LINES = 30


def run_command(
    command: str,
    study: Study,
    scripts_dir: Path | None,
    cluster: Path | None,
    dry_run: bool,
    run_name: str,
    failed: bool,
) -> None:
    """Run the subcommand `command`. The other arguments are its flags. Raises UserError if a required flag is missing."""
    if command == "status":
        table.show_status(study)
        if submitted_jobs.jobs_file(study.directory).is_file():
            status.print_status(study)
    elif command == "submit":
        if cluster is None:
            raise UserError("submit requires --cluster cluster.env (see slurm/cluster.env.example)")
        submit.submit(study, scripts_dir, cluster, dry_run)
    elif command == "resubmit":
        if not failed:
            raise UserError("resubmit requires --failed; 'submit' submits everything that is not done")
        submit.resubmit(study, scripts_dir)
    elif command == "logs":
        if not run_name:
            raise UserError(f"logs requires the name of a run, e.g. {study.runs[0].name}")
        _show_logs(study, run_name)
    else:
        if live := submit.live_jobs(study.directory):
            slurm.cancel(sorted(map(str, live.values())))
        terminal.info(f"study {study.name}: {len(live)} jobs cancelled; finished stages are kept")


def _show_logs(study: Study, name: str) -> None:
    """Print the last lines of the logs of each stage whose subject (e.g. a run), label or kind is `name`."""
    all_stages = stages.study_stages(study)
    named_stages = [stage for stage in all_stages if name in (stage.subject, stage.label, stage.kind)]
    if not named_stages:
        names = list(dict.fromkeys(stage.subject for stage in all_stages))
        raise UserError(
            f"study {study.name} has no run {name!r}{did_you_mean(name, names)}; it has {', '.join(names)}"
        )
    jobs = submitted_jobs.read_jobs(study.directory)
    for stage in named_stages:
        job = jobs.get(stage.label)
        for log in [stage.log, *([Path(job.output)] if job else [])]:
            if log.is_file() and log.stat().st_size:
                end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
                terminal.info("\n".join([f"--- {stage.label}: {log}", *end]))
