"""Submit what is left of a study, each job behind those it needs."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Sequence
from pathlib import Path

from trainer.cluster import jobs, scripts, slurm, submitted_jobs, validate
from trainer.cluster.config import ClusterConfig, read_cluster_config
from trainer.cluster.jobs import Dependency, JobId, SlurmJob
from trainer.cluster.scripts import JobPaths
from trainer.cluster.submitted_jobs import SubmittedJob
from trainer.errors import UserError
from trainer.runtime import directory_lock, terminal
from trainer.storage import atomic_dir
from trainer.storage.run_directory import StudyDirectory
from trainer.study import changes, stages, status
from trainer.study.stages import Stage
from trainer.study.study_file import Study


def submit(study: Study, tools: Path | None, cluster: Path, dry_run: bool = False) -> None:
    """Submit every stage that is neither done nor in the queue; with `dry_run` print the scripts and start nothing.

    Raises UserError for what the cluster would refuse, before anything is submitted.
    """
    site = read_cluster_config(cluster)
    changes.check_unchanged(study)
    todo = stages.study_stages(study)
    if dry_run:
        _show(jobs.plan_jobs(todo, _done(todo), {}, study.name), site, _place(study, tools))
        return
    with directory_lock.locked(study.directory.lock):
        slurm.check_installed()
        _submit(study, todo, site, cluster, _place(study, tools))


def resubmit(study: Study, tools: Path | None) -> None:
    """Submit again what was submitted and has failed, and what waited for it, with the facts of the last submission."""
    kept = cluster_file(study.directory)
    before = submitted_jobs.read_jobs(study.directory)
    if not before:
        raise UserError(
            f"nothing of study {study.name} was submitted yet: tools/study.py submit {study.file} --cluster ..."
        )
    todo = [stage for stage in stages.study_stages(study) if stage.label in before or stage.kind == "report"]
    with directory_lock.locked(study.directory.lock):
        _submit(study, todo, read_cluster_config(kept), kept, _place(study, tools))


def cluster_file(study: StudyDirectory) -> Path:
    """The cluster.env of the last submission, as it was."""
    return study.slurm / "cluster.env"


def live_jobs(study: StudyDirectory) -> dict[str, JobId]:
    """label -> job, of the jobs that wait or run."""
    known = submitted_jobs.read_jobs(study)
    found = slurm.jobs(job.job for job in known.values()) if known else {}
    return {label: job.id for label, job in known.items() if job.job in found and found[job.job].is_live}


def _submit(study: Study, todo: Sequence[Stage], site: ClusterConfig, cluster: Path, place: JobPaths) -> None:
    live = live_jobs(study.directory)
    # A report in the queue would show less than there will be, and two must not write one directory.
    earlier_report = live.pop(todo[-1].label, None)
    done = _done(todo)
    planned = jobs.plan_jobs(todo, done, live, study.name)
    if not planned:
        terminal.info(f"study {study.name}: nothing to submit, {len(done)} stages are done")
        return
    validate.validate(planned, site, str(cluster))
    texts = [scripts.script_text(batch, site, place) for batch in planned]
    _copy_launcher(place)
    if earlier_report:
        slurm.cancel([str(earlier_report)])
    before = submitted_jobs.read_jobs(study.directory)
    submitted: list[str] = []
    written: list[Path] = []
    try:
        for batch, text in zip(planned, texts, strict=True):
            path = _script_path(study.directory, batch)
            atomic_dir.write_text(path, text)
            written.append(path)
            # Held, so that nothing has begun if Slurm refuses a later one.
            submitted.append(slurm.submit_held(path, dependency(batch.dependencies, submitted)))
            submitted_jobs.add_jobs(
                study.directory, _jobs(batch, submitted[-1]), path, scripts.output(batch, place)
            )
        slurm.release(submitted)
    except UserError as error:
        _cancel_submitted(study.directory, submitted, written, before)
        asked = " ".join(f"--{option}" for option in scripts.options(batch, site, place))
        suspects = validate.left_to_slurm(site)
        raise UserError(
            f"{cluster}: Slurm refuses the {batch.kind} jobs, so nothing stays submitted: {error}"
            f"{'; is it ' + ', '.join(suspects) + '?' if suspects else ''} (asked for: {asked})"
        ) from None
    for batch, job in zip(planned, submitted, strict=True):
        terminal.info(_in_words(batch, job, dependency(batch.dependencies, submitted)))
    changes.save_snapshot(study)
    kept = cluster_file(study.directory)
    if cluster != kept:
        atomic_dir.write_text(kept, cluster.read_text(encoding="utf-8"))
    terminal.info(
        f"study {study.name}: {sum(len(batch.stages) for batch in planned)} stages in {len(planned)} jobs, "
        f"{len(done)} done, {len(live)} in the queue before; how it goes: tools/study.py status {study.file}"
    )


def dependency(needs: Sequence[Dependency], submitted: Sequence[str]) -> str:
    """`afterok:12:13_4,aftercorr:14` in sbatch's words."""
    by_how: dict[str, list[str]] = {}
    for need in needs:
        job = submitted[need.job] if isinstance(need.job, int) else need.job
        by_how.setdefault(need.how, []).append(str(JobId(job, need.index)))
    return ",".join(f"{how}:{':'.join(jobs)}" for how, jobs in by_how.items())


def _show(planned: Sequence[SlurmJob], site: ClusterConfig, place: JobPaths) -> None:
    for number, batch in enumerate(planned):
        names = [f"<{other.name} {position}>" for position, other in enumerate(planned)]
        terminal.info(
            f"### {number}: {_in_words(batch, f'<{batch.name} {number}>', dependency(batch.dependencies, names))}"
        )
        terminal.info(scripts.script_text(batch, site, place))
    terminal.info(
        f"{sum(len(batch.stages) for batch in planned)} stages in {len(planned)} jobs; nothing was submitted"
    )


def _in_words(batch: SlurmJob, job: str, after: str) -> str:
    what = batch.stages[0].label if len(batch.stages) == 1 else f"{len(batch.stages)} x {batch.kind}"
    return f"{what}: job {job}{' after ' + after if after else ''}"


def _jobs(batch: SlurmJob, job: str) -> dict[str, JobId]:
    indices: Sequence[int | None] = batch.indices or [None]
    return {stage.label: JobId(job, index) for stage, index in zip(batch.stages, indices, strict=True)}


def _cancel_submitted(
    study: StudyDirectory, submitted: list[str], written: list[Path], before: dict[str, SubmittedJob]
) -> None:
    if submitted:
        slurm.cancel(submitted)
    submitted_jobs.write_jobs(study, before)
    for path in written:
        path.unlink()


def _done(todo: Sequence[Stage]) -> set[str]:
    """Labels of finished stages. A report is not, however fresh, while an evaluation it will show is to come."""
    done = {stage.label for stage in todo if status.is_done(stage)}
    report = todo[-1]
    return done - {report.label} if any(label not in done for label in report.needs) else done


def _place(study: Study, tools: Path | None) -> JobPaths:
    logs = study.directory.slurm
    slurm_files = Path(os.path.normpath(tools / ".." / "slurm")) if tools else logs
    return JobPaths(Path.cwd(), tools, slurm_files, logs)


def _copy_launcher(place: JobPaths) -> None:
    """Without a repository, copy the packaged ranks.sh to the study's directory, which all nodes can read."""
    if place.tools is None:
        packaged = (importlib.resources.files("trainer.cluster") / "ranks.sh").read_text(encoding="utf-8")
        path = place.slurm / "ranks.sh"
        if not path.is_file() or path.read_text(encoding="utf-8") != packaged:
            atomic_dir.write_text(path, packaged)
        path.chmod(0o755)


def _script_path(study: StudyDirectory, batch: SlurmJob) -> Path:
    """Scripts of an earlier submission are kept: their jobs may still run and be restarted."""
    taken = len(list(study.slurm.glob("*.sbatch"))) if study.slurm.is_dir() else 0
    return study.slurm / f"{taken:03d}-{batch.kind}.sbatch"
