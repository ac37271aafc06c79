"""Group the stages of a study into Slurm jobs with their dependencies.

Training, conversion and evaluation of runs with the same resources are one job array each, so that a study of any size
is a few submissions, and MAX_RUNNING limits how many tasks run at a time. Task 3 of an array depends on task 3 of the
array before it (`aftercorr`), so that no run waits for the slowest. A stage that depends on several runs (a pair of
models) is a separate job. Shards are prepared by jobs without accelerator.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from trainer.study.stages import SCRIPTS, Stage

_ARRAYS = ("train", "convert", "evaluate")
_MAX_ARRAY_SIZE = 1000  # Slurm's default MaxArraySize is 1001
JobReference = tuple[int | str, int | None]  # a job as in Dependency, and the task of an array


@dataclass(frozen=True)
class JobId:
    """A job, or the task `index` of a job array."""

    job: str
    index: int | None = None

    def __str__(self) -> str:
        return self.job if self.index is None else f"{self.job}_{self.index}"

    @classmethod
    def parse(cls, text: str) -> JobId:
        job, _, index = text.partition("_")
        return cls(job, int(index) if index else None)


@dataclass(frozen=True)
class Dependency:
    """A dependency on a job, or on the task `index` of an array."""

    condition: str  # afterok, aftercorr, afterany
    job: int | str  # number in this submission (int), or the id of a submitted job
    index: int | None = None


@dataclass(frozen=True)
class SlurmJob:
    """One batch script. `indices`: the array's task numbers, one per stage; empty for a single job."""

    name: str
    kind: str
    stages: tuple[Stage, ...]
    dependencies: tuple[Dependency, ...]
    indices: tuple[int, ...] = ()

    @property
    def num_ranks(self) -> int:
        return self.stages[0].num_ranks

    @property
    def needs_accelerator(self) -> bool:
        """True if the job trains, evaluates, or annotates with a local model."""
        local_teacher = self.kind == "annotate" and bool(self.stages[0].settings.model_name_or_path)
        return self.kind in ("train", "evaluate") or local_teacher


def plan_jobs(
    stages: Sequence[Stage], done: Collection[str], live: Mapping[str, JobId], study_name: str
) -> list[SlurmJob]:
    """Return jobs for all stages that are neither done nor `live` (label -> job), in an order for submission."""
    jobs: list[SlurmJob] = []
    assigned: dict[str, JobReference] = {label: (job.job, job.index) for label, job in live.items()}
    waiting = [stage for stage in stages if stage.label not in done and stage.label not in live]
    for kind in SCRIPTS:  # in the order of dependencies
        groups: dict[object, list[Stage]] = {}
        for stage in (stage for stage in waiting if stage.kind == kind):
            groups.setdefault(_signature(stage, assigned), []).append(stage)
        for key, group in groups.items():
            for start in range(0, len(group), _MAX_ARRAY_SIZE):
                chunk = group[start : start + _MAX_ARRAY_SIZE]
                job = _slurm_job(f"{study_name}.{kind}", chunk, assigned, is_array=key != chunk[0].label)
                for position, stage in enumerate(chunk):
                    assigned[stage.label] = (len(jobs), job.indices[position] if job.indices else None)
                jobs.append(job)
    return jobs


def _signature(stage: Stage, assigned: Mapping[str, JobReference]) -> object:
    """Return a key that is equal for stages of one array; the stage's label if it must be a single job."""
    refs = [assigned[label] for label in stage.needs if label in assigned]
    tasks = [ref for ref in refs if ref[1] is not None]
    if stage.kind not in _ARRAYS or len(tasks) > 1:
        return stage.label
    whole = frozenset(ref[0] for ref in refs if ref[1] is None)
    # Two evaluations of one run depend on the same task of the conversion, so they cannot be in one array.
    return (stage.num_ranks, whole, tasks[0][0] if tasks else None, stage.detail)


def _slurm_job(
    name: str, stages: Sequence[Stage], assigned: Mapping[str, JobReference], is_array: bool
) -> SlurmJob:
    refs = [[assigned[label] for label in stage.needs if label in assigned] for stage in stages]
    # A report is made even after failures.
    condition = "afterany" if stages[0].kind == "report" else "afterok"
    dependencies = {Dependency(condition, job) for job, index in refs[0] if index is None}
    tasks = [(job, index) for of_stage in refs for job, index in of_stage if index is not None]
    indices: tuple[int, ...] = ()
    if is_array and len(stages) > 1:
        indices = tuple(index for _, index in tasks) or tuple(range(len(stages)))
        dependencies |= {Dependency("aftercorr", job) for job, _ in tasks}
    elif condition == "afterany":
        dependencies |= {Dependency(condition, job) for job, _ in tasks}
    else:
        dependencies |= {Dependency(condition, job, index) for job, index in tasks}
    ordered = sorted(dependencies, key=lambda one: (one.condition, str(one.job), one.index or 0))
    return SlurmJob(name, stages[0].kind, tuple(stages), tuple(ordered), indices)
