"""Check cluster.env against the cluster, and submit the remaining stages of a study as Slurm jobs with dependencies."""

import importlib.resources
import os
import re
from collections.abc import Sequence
from pathlib import Path

from trainer.cluster import jobs, scripts, slurm, submitted_jobs
from trainer.cluster.config import TIME, ClusterConfig, parse_seconds, read_cluster_config
from trainer.cluster.jobs import Dependency, JobId, SlurmJob
from trainer.cluster.scripts import JobPaths
from trainer.errors import UserError
from trainer.runtime import directory_lock, terminal
from trainer.storage import atomic_dir
from trainer.storage.configuration import did_you_mean
from trainer.storage.run_directory import StudyDirectory
from trainer.study import changes, stages, status
from trainer.study.stages import Stage
from trainer.study.study_file import Study


def submit(study: Study, scripts_dir: Path | None, cluster: Path, dry_run: bool = False) -> None:
    """Submit every stage that is not done and has no pending or running job.

    With `dry_run`, print the batch scripts of all stages that are not done, and submit no job. Raises UserError if the
    settings contradict sinfo, or if Slurm rejects a job. In both cases, no job of this submission remains in the queue.
    """
    config = read_cluster_config(cluster)
    changes.check_unchanged(study)
    todo = stages.study_stages(study)
    if dry_run:
        _show(jobs.make_jobs(todo, _done(todo), {}, study.name), config, _job_paths(study, scripts_dir))
        return
    with directory_lock.locked(study.directory.lock):
        _submit(study, todo, config, cluster, _job_paths(study, scripts_dir))


def resubmit(study: Study, scripts_dir: Path | None) -> None:
    """Submit the failed stages and their dependents again, with the cluster.env of the last submission."""
    labels = submitted_jobs.read_jobs(study.directory).keys()
    if not labels:
        raise UserError(
            f"nothing of study {study.name} was submitted yet: tools/study.py submit {study.file} --cluster ..."
        )
    todo = [stage for stage in stages.study_stages(study) if stage.label in labels or stage.kind == "report"]
    cluster = _last_config(study)
    with directory_lock.locked(study.directory.lock):
        _submit(study, todo, read_cluster_config(cluster), cluster, _job_paths(study, scripts_dir))


def _last_config(study: Study) -> Path:
    """Return the path of the copy of cluster.env that every submission writes."""
    return study.directory.slurm / "cluster.env"


def live_jobs(study: StudyDirectory) -> dict[str, JobId]:
    """Return {stage label: job id} of all pending or running jobs."""
    submitted = submitted_jobs.read_jobs(study)
    queue = slurm.jobs(job.job for job in submitted.values()) if submitted else {}
    return {label: job.id for label, job in submitted.items() if job.job in queue and queue[job.job].is_live}


def _submit(study: Study, todo: list[Stage], config: ClusterConfig, cluster: Path, paths: JobPaths) -> None:
    slurm.check_installed()
    live = live_jobs(study.directory)
    # An earlier report job does not depend on the new jobs, but writes to the same directory. It is cancelled below.
    earlier_report = live.pop(todo[-1].label, None)
    done = _done(todo)
    planned = jobs.make_jobs(todo, done, live, study.name)
    if not planned:
        terminal.info(f"study {study.name}: nothing to submit, {len(done)} stages are done")
        return
    _validate(planned, config, str(cluster))
    texts = [scripts.script_text(slurm_job, config, paths) for slurm_job in planned]
    _copy_launcher(paths)
    if earlier_report:
        slurm.cancel([str(earlier_report)])
    earlier_jobs = submitted_jobs.read_jobs(study.directory)
    submitted: list[str] = []
    written: list[Path] = []
    try:
        for slurm_job, text in zip(planned, texts, strict=True):
            # The path must be new, because jobs.json may still name the scripts of earlier submissions.
            number = len(list(study.directory.slurm.glob("*.sbatch")))
            path = study.directory.slurm / f"{number:03d}-{slurm_job.kind}.sbatch"
            atomic_dir.write_text(path, text)
            written.append(path)
            # Jobs are held, so that no job starts if Slurm rejects a later job.
            job = slurm.submit_held(path, dependency_argument(slurm_job.dependencies, submitted))
            submitted.append(job)
            indexed_stages = zip(slurm_job.stages, slurm_job.indices or [None], strict=True)
            ids = {stage.label: JobId(job, index) for stage, index in indexed_stages}
            submitted_jobs.add_jobs(study.directory, ids, path, scripts.output(slurm_job, paths))
        slurm.release(submitted)
    except UserError as error:
        if submitted:
            slurm.cancel(submitted)
        submitted_jobs.write_jobs(study.directory, earlier_jobs)
        for path in written:
            path.unlink()
        rejected = (
            f"the {slurm_job.kind} jobs" if len(submitted) < len(planned) else "the release of the held jobs"
        )
        requested = " ".join(f"--{option}" for option in scripts.options(slurm_job, config, paths))
        unchecked = ("account", "qos", "constraint", "reservation", "memory_per_node", "cpu_memory")
        suspects = [f"{key.upper()}={getattr(config, key)}" for key in unchecked if getattr(config, key)]
        raise UserError(
            f"{cluster}: Slurm rejected {rejected}, so all jobs were cancelled: {error}"
            f"{'; is it ' + ', '.join(suspects) + '?' if suspects else ''} (requested: {requested})"
        ) from None
    for slurm_job, job in zip(planned, submitted, strict=True):
        terminal.info(_job_text(slurm_job, job, submitted))
    changes.save_snapshot(study)
    if cluster != _last_config(study):
        atomic_dir.write_text(_last_config(study), cluster.read_text(encoding="utf-8"))
    terminal.info(
        f"study {study.name}: {sum(len(slurm_job.stages) for slurm_job in planned)} stages in {len(planned)} jobs, "
        f"{len(done)} done, {len(live)} in the queue before; progress: tools/study.py status {study.file}"
    )


def _validate(slurm_jobs: Sequence[SlurmJob], config: ClusterConfig, where: str) -> None:
    """Raise UserError if a partition, time limit or GPU request contradicts sinfo. Only sbatch can check the account."""
    partitions = slurm.partitions()
    for slurm_job in slurm_jobs:
        on_accelerator = slurm_job.needs_accelerator
        key = "PARTITION" if on_accelerator or not config.cpu_partition else "CPU_PARTITION"
        names = getattr(config, key.lower()) or slurm.default_partition()
        if not names:
            raise UserError(
                f"{where}: {key} is missing and this cluster has no default; choose one of {', '.join(partitions)}"
            )
        limit_keys = {"train": "TIME_LIMIT", "evaluate": "EVALUATE_TIME_LIMIT"}
        limit_key = limit_keys.get(slurm_job.kind, "CPU_TIME_LIMIT")
        requested = getattr(config, limit_key.lower())
        for name in names.split(","):
            if name not in partitions:
                raise UserError(
                    f"{where}: {key}={name}: there is no such partition{did_you_mean(name, partitions)}; "
                    f"this cluster has {', '.join(partitions)}"
                )
            limit, gres, state = partitions[name]
            if state != "up":
                raise UserError(f"{where}: {key}={name}: the partition is {state}")
            is_limited = TIME.fullmatch(limit)  # None for "infinite"
            if is_limited and parse_seconds(requested) > parse_seconds(limit):
                raise UserError(f"{where}: {limit_key}={requested}: partition {name} allows at most {limit}")
            if on_accelerator and config.gpus_per_node:
                _validate_gpus(name, gres, config, where)


def _validate_gpus(partition: str, gres: str, config: ClusterConfig, where: str) -> None:
    """Raise UserError if no node type in `gres`, e.g. "gpu:a100:4(S:0-1),gpu:h100:8", has the requested GPUs."""
    gpus = [(gpu_type, int(count)) for gpu_type, count in re.findall(r"gpu:(?:([^:,()]+):)?(\d+)", gres)]
    if not gpus:
        raise UserError(f"{where}: GPUS_PER_NODE={config.gpus_per_node}: partition {partition} has no GPUs")
    types = sorted({gpu_type for gpu_type, _ in gpus if gpu_type})
    if config.gpu_type and config.gpu_type not in types:
        raise UserError(
            f"{where}: GPU_TYPE={config.gpu_type}: the partition {partition} has no such type"
            f"{did_you_mean(config.gpu_type, types)}; it has {', '.join(types) or 'accelerators without a type'}"
        )
    max_gpus = max(count for gpu_type, count in gpus if config.gpu_type in ("", gpu_type))
    if config.gpus_per_node > max_gpus:
        raise UserError(
            f"{where}: GPUS_PER_NODE={config.gpus_per_node}: a node of {partition} has {max_gpus} at most"
        )


def dependency_argument(needs: Sequence[Dependency], submitted: Sequence[str]) -> str:
    """Return the argument of sbatch --dependency, e.g. `afterok:12:13_4,aftercorr:14`."""
    by_condition: dict[str, list[str]] = {}
    for need in needs:
        job = submitted[need.job] if isinstance(need.job, int) else need.job
        by_condition.setdefault(need.condition, []).append(str(JobId(job, need.index)))
    return ",".join(f"{condition}:{':'.join(jobs)}" for condition, jobs in by_condition.items())


def _show(planned: Sequence[SlurmJob], config: ClusterConfig, paths: JobPaths) -> None:
    names = [f"<{slurm_job.name} {number}>" for number, slurm_job in enumerate(planned)]
    for number, slurm_job in enumerate(planned):
        terminal.info(f"### {number}: {_job_text(slurm_job, names[number], names)}")
        terminal.info(scripts.script_text(slurm_job, config, paths))
    num_stages = sum(len(slurm_job.stages) for slurm_job in planned)
    terminal.info(f"{num_stages} stages in {len(planned)} jobs; nothing was submitted")


def _job_text(slurm_job: SlurmJob, job: str, submitted: Sequence[str]) -> str:
    needs = dependency_argument(slurm_job.dependencies, submitted)
    first_stage, num_stages = slurm_job.stages[0], len(slurm_job.stages)
    subject = first_stage.label if num_stages == 1 else f"{num_stages} x {slurm_job.kind}"
    return f"{subject}: job {job}{' after ' + needs if needs else ''}"


def _done(todo: Sequence[Stage]) -> set[str]:
    """Return the labels of the stages that are done. The report is not done if a stage that it needs is not done."""
    done = {stage.label for stage in todo if status.is_done(stage)}
    report = todo[-1]
    return done - {report.label} if any(label not in done for label in report.needs) else done


def _job_paths(study: Study, scripts_dir: Path | None) -> JobPaths:
    logs = study.directory.slurm
    slurm_files = Path(os.path.normpath(scripts_dir / ".." / "slurm")) if scripts_dir else logs
    return JobPaths(Path.cwd(), scripts_dir, slurm_files, logs)


def _copy_launcher(paths: JobPaths) -> None:
    """Copy ranks.sh to the study's directory, which all nodes can read. No effect if the tool runs from a checkout."""
    if paths.scripts_dir is None:
        packaged = (importlib.resources.files("trainer.cluster") / "ranks.sh").read_text(encoding="utf-8")
        path = paths.slurm / "ranks.sh"
        if not path.is_file() or path.read_text(encoding="utf-8") != packaged:
            atomic_dir.write_text(path, packaged)
        path.chmod(0o755)
