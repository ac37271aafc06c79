"""Read and write jobs.json, which holds the last submitted job of every stage of a study."""

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
    """The last submitted job of a stage."""

    job: str  # job id, e.g. "12", or "12_3" for a task of a job array
    script: str
    output: str  # log file of the Slurm job; the stage writes a log of its own
    time: str

    @property
    def id(self) -> JobId:
        return JobId.parse(self.job)


def jobs_file(study: StudyDirectory) -> Path:
    return study.slurm / "jobs.json"


def read_jobs(study: StudyDirectory) -> dict[str, SubmittedJob]:
    """Return {stage label: last submitted job}; {} if there is no file. Raises UserError if the file is damaged."""
    path = jobs_file(study)
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
    """Add `jobs` {stage label: job} to jobs.json. `output`: path of the logs, with sbatch's placeholders %j, %A and %a."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    submitted = {}
    for label, job in jobs.items():
        name = output.replace("%j", job.job).replace("%A", job.job).replace("%a", str(job.index))
        submitted[label] = SubmittedJob(str(job), str(script), name, now)
    write_jobs(study, {**read_jobs(study), **submitted})


def write_jobs(study: StudyDirectory, jobs: Mapping[str, SubmittedJob]) -> None:
    """Write jobs.json, or delete it if there are no jobs."""
    if not jobs:
        jobs_file(study).unlink(missing_ok=True)
        return
    record = {"format": _FORMAT, "jobs": {label: asdict(job) for label, job in jobs.items()}}
    atomic_dir.write_text(jobs_file(study), json.dumps(record, indent=1) + "\n")
