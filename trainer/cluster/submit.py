"""Submit the remaining stages of a study as Slurm jobs with dependencies, after checks against the cluster."""

from __future__ import annotations

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


def submit(study: Study, tools: Path | None, cluster: Path, dry_run: bool = False) -> None:
    """Submit every stage that is neither done nor in the queue; with `dry_run`, only print the scripts.

    Raises UserError, before anything is submitted, for settings that the cluster would reject.
    """
    config = read_cluster_config(cluster)
    changes.check_unchanged(study)
    todo = stages.study_stages(study)
    if dry_run:
        _show(jobs.plan_jobs(todo, _done(todo), {}, study.name), config, _job_paths(study, tools))
        return
    with directory_lock.locked(study.directory.lock):
        slurm.check_installed()
        _submit(study, todo, config, cluster, _job_paths(study, tools))


def resubmit(study: Study, tools: Path | None) -> None:
    """Submit the failed stages and their dependents again, with the cluster.env of the last submission."""
    kept = submitted_config(study.directory)
    before = submitted_jobs.read_jobs(study.directory)
    if not before:
        raise UserError(
            f"nothing of study {study.name} was submitted yet: tools/study.py submit {study.file} --cluster ..."
        )
    todo = [stage for stage in stages.study_stages(study) if stage.label in before or stage.kind == "report"]
    with directory_lock.locked(study.directory.lock):
        _submit(study, todo, read_cluster_config(kept), kept, _job_paths(study, tools))


def submitted_config(study: StudyDirectory) -> Path:
    """Return the path of the copy of cluster.env of the last submission."""
    return study.slurm / "cluster.env"


def live_jobs(study: StudyDirectory) -> dict[str, JobId]:
    """Return stage label -> job id of all pending or running jobs."""
    known = submitted_jobs.read_jobs(study)
    found = slurm.jobs(job.job for job in known.values()) if known else {}
    return {label: job.id for label, job in known.items() if job.job in found and found[job.job].is_live}


def _submit(
    study: Study, todo: Sequence[Stage], config: ClusterConfig, cluster: Path, paths: JobPaths
) -> None:
    live = live_jobs(study.directory)
    # A report in the queue would miss the new results, and two must not write to one directory.
    earlier_report = live.pop(todo[-1].label, None)
    done = _done(todo)
    planned = jobs.plan_jobs(todo, done, live, study.name)
    if not planned:
        terminal.info(f"study {study.name}: nothing to submit, {len(done)} stages are done")
        return
    _validate(planned, config, str(cluster))
    texts = [scripts.script_text(batch, config, paths) for batch in planned]
    _copy_launcher(paths)
    if earlier_report:
        slurm.cancel([str(earlier_report)])
    before = submitted_jobs.read_jobs(study.directory)
    submitted: list[str] = []
    written: list[Path] = []
    try:
        for batch, text in zip(planned, texts, strict=True):
            # A new path: jobs of an earlier submission may still need their scripts for a restart.
            number = len(list(study.directory.slurm.glob("*.sbatch")))
            path = study.directory.slurm / f"{number:03d}-{batch.kind}.sbatch"
            atomic_dir.write_text(path, text)
            written.append(path)
            # On hold, so that nothing has started if Slurm rejects a later job.
            submitted.append(slurm.submit_held(path, dependency(batch.dependencies, submitted)))
            indices: Sequence[int | None] = batch.indices or [None]
            ids = {
                stage.label: JobId(submitted[-1], index)
                for stage, index in zip(batch.stages, indices, strict=True)
            }
            submitted_jobs.add_jobs(study.directory, ids, path, scripts.output(batch, paths))
        slurm.release(submitted)
    except UserError as error:
        if submitted:
            slurm.cancel(submitted)
        submitted_jobs.write_jobs(study.directory, before)
        for path in written:
            path.unlink()
        requested = " ".join(f"--{option}" for option in scripts.options(batch, config, paths))
        suspects = _unchecked_settings(config)
        raise UserError(
            f"{cluster}: Slurm rejected the {batch.kind} jobs, so all jobs were cancelled: {error}"
            f"{'; is it ' + ', '.join(suspects) + '?' if suspects else ''} (requested: {requested})"
        ) from None
    for batch, job in zip(planned, submitted, strict=True):
        terminal.info(_job_text(batch, job, submitted))
    changes.save_snapshot(study)
    kept = submitted_config(study.directory)
    if cluster != kept:
        atomic_dir.write_text(kept, cluster.read_text(encoding="utf-8"))
    terminal.info(
        f"study {study.name}: {sum(len(batch.stages) for batch in planned)} stages in {len(planned)} jobs, "
        f"{len(done)} done, {len(live)} in the queue before; progress: tools/study.py status {study.file}"
    )


def _validate(batches: Sequence[SlurmJob], config: ClusterConfig, where: str) -> None:
    """Check the configuration against sinfo; the other settings (accounts, constraints) only sbatch can check.

    Raises UserError with `where` (the cluster.env) and the key.
    """
    slurm.check_installed()
    partitions = slurm.partitions()
    for batch in batches:
        on_accelerator = batch.needs_accelerator
        key = "PARTITION" if on_accelerator or not config.cpu_partition else "CPU_PARTITION"
        names = getattr(config, key.lower()) or slurm.default_partition()
        if not names:
            raise UserError(
                f"{where}: {key} is missing and this cluster has no default; choose one of {', '.join(partitions)}"
            )
        limits = {"train": "TIME_LIMIT", "evaluate": "EVALUATE_TIME_LIMIT"}
        limit_key = limits.get(batch.kind, "CPU_TIME_LIMIT")
        requested = getattr(config, limit_key.lower())
        for name in names.split(","):
            if name not in partitions:
                raise UserError(
                    f"{where}: {key}={name}: there is no such partition{did_you_mean(name, partitions)}; "
                    f"this cluster has {', '.join(partitions)}"
                )
            state, limit = partitions[name]["state"], partitions[name]["limit"]
            if state != "up":
                raise UserError(f"{where}: {key}={name}: the partition is {state}")
            is_limited = TIME.fullmatch(limit)  # else infinite
            if is_limited and parse_seconds(requested) > parse_seconds(limit):
                raise UserError(
                    f"{where}: {limit_key}={requested}: the partition {name} allows at most {limit}"
                )
            if on_accelerator and config.gpus_per_node:
                _validate_gpus(name, partitions[name]["gres"], config, where)


def _unchecked_settings(config: ClusterConfig) -> list[str]:
    """Return KEY=value of the settings that only sbatch can check."""
    keys = ("account", "qos", "constraint", "reservation", "memory_per_node", "cpu_memory")
    return [f"{key.upper()}={getattr(config, key)}" for key in keys if getattr(config, key)]


def _validate_gpus(partition: str, gres: str, config: ClusterConfig, where: str) -> None:
    """Raise UserError if no node of `gres`, e.g. "gpu:a100:4(S:0-1),gpu:h100:8", has the GPUs of the configuration."""
    gpus = [(kind or "", int(count)) for kind, count in re.findall(r"gpu:(?:([^:,()]+):)?(\d+)", gres)]
    if not gpus:
        raise UserError(
            f"{where}: GPUS_PER_NODE={config.gpus_per_node}: the partition {partition} has no accelerators"
        )
    types = sorted({kind for kind, _ in gpus if kind})
    if config.gpu_type and config.gpu_type not in types:
        raise UserError(
            f"{where}: GPU_TYPE={config.gpu_type}: the partition {partition} has no such type"
            f"{did_you_mean(config.gpu_type, types)}; it has {', '.join(types) or 'accelerators without a type'}"
        )
    max_gpus = max(count for kind, count in gpus if not config.gpu_type or kind == config.gpu_type)
    if config.gpus_per_node > max_gpus:
        raise UserError(
            f"{where}: GPUS_PER_NODE={config.gpus_per_node}: a node of {partition} has {max_gpus} at most"
        )


def dependency(needs: Sequence[Dependency], submitted: Sequence[str]) -> str:
    """Return the argument of sbatch --dependency, e.g. `afterok:12:13_4,aftercorr:14`."""
    by_condition: dict[str, list[str]] = {}
    for need in needs:
        job = submitted[need.job] if isinstance(need.job, int) else need.job
        by_condition.setdefault(need.condition, []).append(str(JobId(job, need.index)))
    return ",".join(f"{condition}:{':'.join(jobs)}" for condition, jobs in by_condition.items())


def _show(planned: Sequence[SlurmJob], config: ClusterConfig, paths: JobPaths) -> None:
    names = [f"<{batch.name} {number}>" for number, batch in enumerate(planned)]
    for number, batch in enumerate(planned):
        terminal.info(f"### {number}: {_job_text(batch, names[number], names)}")
        terminal.info(scripts.script_text(batch, config, paths))
    terminal.info(
        f"{sum(len(batch.stages) for batch in planned)} stages in {len(planned)} jobs; nothing was submitted"
    )


def _job_text(batch: SlurmJob, job: str, submitted: Sequence[str]) -> str:
    after = dependency(batch.dependencies, submitted)
    stages_text = batch.stages[0].label if len(batch.stages) == 1 else f"{len(batch.stages)} x {batch.kind}"
    return f"{stages_text}: job {job}{' after ' + after if after else ''}"


def _done(todo: Sequence[Stage]) -> set[str]:
    """Return labels of finished stages; without the report if it will have to show further evaluations."""
    done = {stage.label for stage in todo if status.is_done(stage)}
    report = todo[-1]
    return done - {report.label} if any(label not in done for label in report.needs) else done


def _job_paths(study: Study, tools: Path | None) -> JobPaths:
    logs = study.directory.slurm
    slurm_files = Path(os.path.normpath(tools / ".." / "slurm")) if tools else logs
    return JobPaths(Path.cwd(), tools, slurm_files, logs)


def _copy_launcher(paths: JobPaths) -> None:
    """Without a repository, copy the packaged ranks.sh to the study's directory, which all nodes can read."""
    if paths.tools is None:
        packaged = (importlib.resources.files("trainer.cluster") / "ranks.sh").read_text(encoding="utf-8")
        path = paths.slurm / "ranks.sh"
        if not path.is_file() or path.read_text(encoding="utf-8") != packaged:
            atomic_dir.write_text(path, packaged)
        path.chmod(0o755)
