"""Which jobs were submitted for a study: jobs.json beside their scripts, the last job of every stage."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.cluster.jobs import JobId
from trainer.errors import UserError
from trainer.storage import atomic_dir
from trainer.storage.run_directory import StudyDirectory

_FORMAT = 1


@dataclass(frozen=True)
class SubmittedJob:
    """The job of a stage. `output`: what Slurm itself says about it; the stage's own log is in the run directory."""

    job: str
    script: str
    output: str
    time: str

    @property
    def id(self) -> JobId:
        return JobId.parse(self.job)


def file_of(study: StudyDirectory) -> Path:
    return study.slurm / "jobs.json"


def read_jobs(study: StudyDirectory) -> dict[str, SubmittedJob]:
    """label of a stage -> its last job. Raises UserError for a damaged file."""
    path = file_of(study)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {label: SubmittedJob(**job) for label, job in record["jobs"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}); cancel the study's jobs (squeue --me), delete it and submit again"
        ) from None


def add_jobs(study: StudyDirectory, jobs: Mapping[str, JobId], script: Path, output: str) -> None:
    """Written after every submission: if we are killed, at most one job is not in it."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    submitted = {}
    for label, job in jobs.items():
        name = output.replace("%j", job.job).replace("%A", job.job).replace("%a", str(job.index))
        submitted[label] = SubmittedJob(str(job), str(script), name, now)
    write_jobs(study, {**read_jobs(study), **submitted})


def write_jobs(study: StudyDirectory, jobs: Mapping[str, SubmittedJob]) -> None:
    """What is in jobs.json from now on; without any job there is no such file."""
    if not jobs:
        file_of(study).unlink(missing_ok=True)
        return
    record = {"format": _FORMAT, "jobs": {label: asdict(job) for label, job in jobs.items()}}
    atomic_dir.write_text(file_of(study), json.dumps(record, indent=1) + "\n")
