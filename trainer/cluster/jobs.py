"""Which stages of a study become which batch jobs, and which job waits for which: a pure function.

Stages of the runs that ask for the same are one job array each for training, conversion and evaluation: a study of any
size is a handful of submissions, MAX_RUNNING bounds how many run at once, and task 3 of an array follows task 3 of
the one before it (`aftercorr`), so that a run does not wait for the slowest. A stage that needs several runs (two
students that are asked in turn) is a job of its own. Shards are made by jobs that hold no accelerator.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from trainer.study.stages import SCRIPTS, Stage

_ARRAYS = ("train", "convert", "evaluate")
_LARGEST_ARRAY = 1000  # Slurm's default MaxArraySize is 1001


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
    """Start only after `job` (a batch of this submission by its number, or a job of an earlier one): `how` in Slurm's words."""

    how: str  # afterok, aftercorr, afterany
    job: int | str
    index: int | None = None


@dataclass(frozen=True)
class SlurmJob:
    """One batch script. `indices` are the array's task numbers, one a stage; without any it is a single job."""

    name: str
    kind: str
    stages: tuple[Stage, ...]
    dependencies: tuple[Dependency, ...]
    indices: tuple[int, ...] = ()

    @property
    def num_ranks(self) -> int:
        return self.stages[0].num_ranks

    @property
    def holds_accelerator(self) -> bool:
        """Ranks do, and a teacher that is a local model; everything else runs on cores alone."""
        local_teacher = self.kind == "annotate" and bool(self.stages[0].settings.model_name_or_path)
        return self.kind in ("train", "evaluate") or local_teacher


def plan_jobs(
    stages: Sequence[Stage], done: Collection[str], live: Mapping[str, JobId], study_name: str
) -> list[SlurmJob]:
    """The batches for all stages that are neither done nor live (label -> their job), in an order that can be submitted."""
    batches: list[SlurmJob] = []
    placed: dict[str, tuple[int | str, int | None]] = {
        label: (job.job, job.index) for label, job in live.items()
    }
    waiting = [stage for stage in stages if stage.label not in done and stage.label not in live]
    for kind in SCRIPTS:  # in the order of the data, so that what is needed has its place before
        groups: dict[object, list[Stage]] = {}
        for stage in (stage for stage in waiting if stage.kind == kind):
            groups.setdefault(_signature(stage, placed), []).append(stage)
        for key, group in groups.items():
            for start in range(0, len(group), _LARGEST_ARRAY):
                part = group[start : start + _LARGEST_ARRAY]
                batch = _batch(f"{study_name}.{kind}", part, placed, is_array=key != part[0].label)
                for position, stage in enumerate(part):
                    index = batch.indices[position] if batch.indices else None
                    placed[stage.label] = (len(batches), index)
                batches.append(batch)
    return batches


def _signature(stage: Stage, placed: Mapping[str, tuple[int | str, int | None]]) -> object:
    """Stages with equal signatures fit one array; the stage's own label: it is a job of its own."""
    refs = [placed[label] for label in stage.needs if label in placed]
    tasks = [ref for ref in refs if ref[1] is not None]
    if stage.kind not in _ARRAYS or len(tasks) > 1:
        return stage.label
    whole = frozenset(ref[0] for ref in refs if ref[1] is None)
    # Two evaluations of one run follow the same task of the conversion: they cannot be in one array.
    return (stage.num_ranks, whole, tasks[0][0] if tasks else None, stage.detail)


def _batch(
    name: str,
    stages: Sequence[Stage],
    placed: Mapping[str, tuple[int | str, int | None]],
    is_array: bool,
) -> SlurmJob:
    refs = [[placed[label] for label in stage.needs if label in placed] for stage in stages]
    how = "afterany" if stages[0].kind == "report" else "afterok"  # a report shows what there is
    needs = {Dependency(how, job) for job, index in refs[0] if index is None}
    tasks = [[ref for ref in some if ref[1] is not None] for some in refs]
    indices: tuple[int, ...] = ()
    if is_array and len(stages) > 1 and tasks[0]:
        needs.add(Dependency("aftercorr", tasks[0][0][0]))
        indices = tuple(index for some in tasks for _, index in some if index is not None)
    elif is_array and len(stages) > 1:
        indices = tuple(range(len(stages)))
    elif how == "afterany":
        needs |= {Dependency(how, job) for some in tasks for job, _ in some}  # all tasks of the arrays
    else:
        needs |= {Dependency(how, job, index) for some in tasks for job, index in some}
    ordered = sorted(needs, key=lambda need: (need.how, str(need.job), need.index or 0))
    return SlurmJob(name, stages[0].kind, tuple(stages), tuple(ordered), indices)
