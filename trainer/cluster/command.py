"""The subcommands of tools/study.py that use Slurm."""

from __future__ import annotations

from pathlib import Path

from trainer.cluster import manage, status, submit, submitted_jobs
from trainer.errors import UserError
from trainer.study import table
from trainer.study.study_file import Study


def run_command(
    command: str,
    study: Study,
    tools: Path | None,
    cluster: Path | None,
    dry_run: bool,
    run_name: str,
    failed: bool,
) -> None:
    """Run status, submit, resubmit, logs or cancel. Raises UserError if a required flag is missing."""
    if command == "status":
        table.show_status(study)
        if submitted_jobs.jobs_file(study.directory).is_file():
            status.print_status(study)
    elif command == "submit":
        if cluster is None:
            raise UserError("submit requires --cluster cluster.env (see slurm/cluster.env.example)")
        submit.submit(study, tools, cluster, dry_run)
    elif command == "resubmit":
        if not failed:
            raise UserError("resubmit requires --failed; 'submit' submits everything that is not done")
        submit.resubmit(study, tools)
    elif command == "logs":
        if not run_name:
            raise UserError(f"logs requires the name of a run, e.g. {study.runs[0].name}")
        manage.show_logs(study, run_name)
    else:
        manage.cancel(study)
