"""Group the stages of a study into Slurm jobs with dependencies.

Runs share job arrays if they have the same number of ranks and depend on the same unfinished shards. There is one array for
training, one for conversion, and one for each evaluation variant. So a study with many runs takes few submissions, and
MAX_RUNNING limits the number of tasks of an array that run at a time. A conversion or evaluation depends only on the task
of the same index in the previous array (`aftercorr`), not on the slowest run. An evaluation of models from several runs
depends on several tasks, so it is a separate job. Only jobs that train or run a local model request accelerators.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from trainer.study.stages import SCRIPTS, Stage

_ARRAYS = ("train", "convert", "evaluate")
_MAX_ARRAY_SIZE = 1000  # maximum number of tasks; at most Slurm's MaxArraySize (default: 1001)
JobReference = tuple[int | str, int | None]  # `job` and `index` of a Dependency


@dataclass(frozen=True)
class JobId:
    """A job, or the task `index` of a job array."""

    job: str
    index: int | None = None

    def __str__(self) -> str:
        return self.job if self.index is None else f"{self.job}_{self.index}"

    @classmethod
    def parse(cls, text: str) -> Self:
        job, _, index = text.partition("_")
        return cls(job, int(index) if index else None)


@dataclass(frozen=True)
class Dependency:
    """A dependency on a job, or on the task `index` of a job array."""

    condition: str  # afterok, aftercorr or afterany, as in sbatch --dependency
    job: int | str  # position in this submission (int), or the id of a job that was submitted earlier (str)
    index: int | None = None


@dataclass(frozen=True)
class SlurmJob:
    """One batch script: a job array with one task per stage, or a single job with one stage."""

    name: str
    kind: str
    stages: tuple[Stage, ...]
    dependencies: tuple[Dependency, ...]
    indices: tuple[int, ...] = ()  # task indices in the array, one per stage; empty for a single job

    @property
    def num_ranks(self) -> int:
        return self.stages[0].num_ranks

    @property
    def needs_accelerator(self) -> bool:
        """True if the job trains or evaluates a model, or annotates with a local model."""
        local_teacher = self.kind == "annotate" and bool(self.stages[0].settings.model_name_or_path)
        return self.kind in ("train", "evaluate") or local_teacher


def make_jobs(
    stages: Sequence[Stage], done: Collection[str], live: Mapping[str, JobId], study_name: str
) -> list[SlurmJob]:
    """Return jobs for the stages that are neither `done` nor `live` (pending or running), dependencies first."""
    jobs: list[SlurmJob] = []
    assigned: dict[str, JobReference] = {label: (job.job, job.index) for label, job in live.items()}
    waiting = [stage for stage in stages if stage.label not in done and stage.label not in live]
    for kind in SCRIPTS:  # a stage depends only on stages of earlier kinds
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
    """Return a key that all stages of one job array share, or the stage's label if the stage must be a single job."""
    refs = [assigned[label] for label in stage.needs if label in assigned]
    tasks = [ref for ref in refs if ref[1] is not None]
    if stage.kind not in _ARRAYS or len(tasks) > 1:
        return stage.label
    whole = frozenset(ref[0] for ref in refs if ref[1] is None)
    # aftercorr pairs tasks of equal index, so two evaluations that need the same conversion cannot be in one array.
    return (stage.num_ranks, whole, tasks[0][0] if tasks else None, stage.detail)


def _slurm_job(name: str, stages: list[Stage], assigned: dict[str, JobReference], is_array: bool) -> SlurmJob:
    refs = [[assigned[label] for label in stage.needs if label in assigned] for stage in stages]
    condition = "afterany" if stages[0].kind == "report" else "afterok"  # the report starts even if jobs fail
    dependencies = {Dependency(condition, job) for job, index in refs[0] if index is None}
    tasks = [(job, index) for stage_refs in refs for job, index in stage_refs if index is not None]
    indices: tuple[int, ...] = ()
    if is_array and len(stages) > 1:
        indices = tuple(index for _, index in tasks) or tuple(range(len(stages)))
        dependencies |= {Dependency("aftercorr", job) for job, _ in tasks}
    elif condition == "afterany":
        dependencies |= {Dependency(condition, job) for job, _ in tasks}
    else:
        dependencies |= {Dependency(condition, job, index) for job, index in tasks}
    ordered = sorted(dependencies, key=lambda need: (need.condition, str(need.job), need.index or 0))
    return SlurmJob(name, stages[0].kind, tuple(stages), tuple(ordered), indices)
