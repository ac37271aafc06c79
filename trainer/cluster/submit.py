"""Submit what is left of a study, each job behind those it needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from trainer import commit, lock, terminal
from trainer.cluster import batches, check, record, scripts, slurm
from trainer.cluster.batches import Batch, JobId, Need
from trainer.cluster.record import Submitted
from trainer.cluster.scripts import Place
from trainer.cluster.site import Site, read
from trainer.errors import UserError
from trainer.run_directory import StudyDirectory
from trainer.study import changes, stages, state
from trainer.study.plan import Study
from trainer.study.stages import Stage


def submit(study: Study, tools: Path, cluster: Path, dry_run: bool = False) -> None:
    """Submit every stage that is neither done nor in the queue; with `dry_run` print the scripts and start nothing.

    Raises UserError for what the cluster would refuse, before anything is submitted.
    """
    site = read(cluster)
    changes.refuse(study)
    todo = stages.of_study(study)
    if dry_run:
        _show(batches.plan(todo, _done(todo), {}, study.name), site, _place(study, tools))
        return
    with lock.locked(study.directory.lock):
        slurm.refuse_missing()
        _submit(study, todo, site, cluster, _place(study, tools))


def resubmit(study: Study, tools: Path) -> None:
    """Submit again what was submitted and has failed, and what waited for it, with the facts of the last submission."""
    kept = site_file(study.directory)
    before = record.read(study.directory)
    if not before:
        raise UserError(
            f"nothing of study {study.name} was submitted yet: tools/study.py submit {study.file} --cluster ..."
        )
    todo = [stage for stage in stages.of_study(study) if stage.label in before or stage.kind == "report"]
    with lock.locked(study.directory.lock):
        _submit(study, todo, read(kept), kept, _place(study, tools))


def site_file(study: StudyDirectory) -> Path:
    """The cluster.env of the last submission, as it was."""
    return study.slurm / "cluster.env"


def live_jobs(study: StudyDirectory) -> dict[str, JobId]:
    """label -> job, of the jobs that wait or run."""
    known = record.read(study)
    found = slurm.jobs(job.job for job in known.values()) if known else {}
    return {label: job.id for label, job in known.items() if job.job in found and found[job.job].is_live}


def _submit(study: Study, todo: Sequence[Stage], site: Site, cluster: Path, place: Place) -> None:
    live = live_jobs(study.directory)
    # A report in the queue would show less than there will be, and two must not write one directory.
    earlier_report = live.pop(todo[-1].label, None)
    done = _done(todo)
    planned = batches.plan(todo, done, live, study.name)
    if not planned:
        terminal.info(f"study {study.name}: nothing to submit, {len(done)} stages are done")
        return
    check.refuse(planned, site, str(cluster))
    texts = [scripts.text(batch, site, place) for batch in planned]
    if earlier_report:
        slurm.cancel([str(earlier_report)])
    before = record.read(study.directory)
    submitted: list[str] = []
    written: list[Path] = []
    try:
        for batch, text in zip(planned, texts, strict=True):
            path = _script_path(study.directory, batch)
            commit.write_text(path, text)
            written.append(path)
            # Held, so that nothing has begun if Slurm refuses a later one.
            submitted.append(slurm.submit_held(path, dependency(batch.needs, submitted)))
            record.add(study.directory, _jobs(batch, submitted[-1]), path, scripts.output(batch, place))
        slurm.release(submitted)
    except UserError as error:
        _take_back(study.directory, submitted, written, before)
        asked = " ".join(f"--{option}" for option in scripts.options(batch, site, place))
        suspects = check.left_to_slurm(site)
        raise UserError(
            f"{cluster}: Slurm refuses the {batch.kind} jobs, so nothing stays submitted: {error}"
            f"{'; is it ' + ', '.join(suspects) + '?' if suspects else ''} (asked for: {asked})"
        ) from None
    for batch, job in zip(planned, submitted, strict=True):
        terminal.info(_in_words(batch, job, dependency(batch.needs, submitted)))
    changes.remember(study)
    kept = site_file(study.directory)
    if cluster != kept:
        commit.write_text(kept, cluster.read_text(encoding="utf-8"))
    terminal.info(
        f"study {study.name}: {sum(len(batch.stages) for batch in planned)} stages in {len(planned)} jobs, "
        f"{len(done)} done, {len(live)} in the queue before; how it goes: tools/study.py status {study.file}"
    )


def dependency(needs: Sequence[Need], submitted: Sequence[str]) -> str:
    """`afterok:12:13_4,aftercorr:14` in sbatch's words."""
    by_how: dict[str, list[str]] = {}
    for need in needs:
        job = submitted[need.job] if isinstance(need.job, int) else need.job
        by_how.setdefault(need.how, []).append(str(JobId(job, need.index)))
    return ",".join(f"{how}:{':'.join(jobs)}" for how, jobs in by_how.items())


def _show(planned: Sequence[Batch], site: Site, place: Place) -> None:
    for number, batch in enumerate(planned):
        names = [f"<{other.name} {position}>" for position, other in enumerate(planned)]
        terminal.info(
            f"### {number}: {_in_words(batch, f'<{batch.name} {number}>', dependency(batch.needs, names))}"
        )
        terminal.info(scripts.text(batch, site, place))
    terminal.info(
        f"{sum(len(batch.stages) for batch in planned)} stages in {len(planned)} jobs; nothing was submitted"
    )


def _in_words(batch: Batch, job: str, after: str) -> str:
    what = batch.stages[0].label if len(batch.stages) == 1 else f"{len(batch.stages)} x {batch.kind}"
    return f"{what}: job {job}{' after ' + after if after else ''}"


def _jobs(batch: Batch, job: str) -> dict[str, JobId]:
    indices: Sequence[int | None] = batch.indices or [None]
    return {stage.label: JobId(job, index) for stage, index in zip(batch.stages, indices, strict=True)}


def _take_back(
    study: StudyDirectory, submitted: list[str], written: list[Path], before: dict[str, Submitted]
) -> None:
    if submitted:
        slurm.cancel(submitted)
    record.write(study, before)
    for path in written:
        path.unlink()


def _done(todo: Sequence[Stage]) -> set[str]:
    """Labels of finished stages. A report is not, however fresh, while an evaluation it will show is to come."""
    done = {stage.label for stage in todo if state.is_done(stage)}
    report = todo[-1]
    return done - {report.label} if any(label not in done for label in report.needs) else done


def _place(study: Study, tools: Path) -> Place:
    return Place(Path.cwd(), tools, Path(os.path.normpath(tools / ".." / "slurm")), study.directory.slurm)


def _script_path(study: StudyDirectory, batch: Batch) -> Path:
    """Scripts of an earlier submission are kept: their jobs may still run and be restarted."""
    taken = len(list(study.slurm.glob("*.sbatch"))) if study.slurm.is_dir() else 0
    return study.slurm / f"{taken:03d}-{batch.kind}.sbatch"
