"""Generate Slurm batch scripts without secrets. Job dependencies are arguments of sbatch, so the scripts contain no job ids."""

import itertools
import shlex
from dataclasses import dataclass
from pathlib import Path

from trainer.cluster.config import ClusterConfig
from trainer.cluster.jobs import SlurmJob
from trainer.errors import UserError
from trainer.study import stages
from trainer.study.stages import Stage


@dataclass(frozen=True)
class JobPaths:
    """Paths of a job. Relative paths are relative to `directory`."""

    directory: Path  # absolute path of the working directory, on a file system that all nodes share
    scripts_dir: Path | None  # folder of tools/*.py in a checkout; None: run modules of the installed package
    slurm: Path  # folder of ranks.sh
    logs: Path  # folder of Slurm's own messages


def script_text(slurm_job: SlurmJob, config: ClusterConfig, paths: JobPaths) -> str:
    """Return the text of a batch script. Raises UserError if the ranks do not fit the nodes of the cluster."""
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH --{option}" for option in options(slurm_job, config, paths))]
    lines += ["set -euo pipefail", f"cd {shlex.quote(str(paths.directory))}"]
    if config.modules:
        lines.append(f"module load {shlex.join(config.modules)}")
    if config.scratch:
        lines += [
            f"export TMPDIR={shlex.quote(config.scratch)}/job-$SLURM_JOB_ID",
            "export TRITON_CACHE_DIR=$TMPDIR/triton TORCH_EXTENSIONS_DIR=$TMPDIR/torch_extensions",
            "on_every_node=(srun --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 --cpus-per-task=1)",
            '"${on_every_node[@]}" mkdir -p "$TMPDIR"',
            """trap '"${on_every_node[@]}" rm -rf "$TMPDIR"' EXIT""",
        ]
    if slurm_job.indices:
        lines.append('case "$SLURM_ARRAY_TASK_ID" in')
        for index, stage in zip(slurm_job.indices, slurm_job.stages, strict=True):
            lines += [f"{index})", *_stage_arguments(stage, "    "), "    ;;"]
        lines.append("esac")
    else:
        lines += _stage_arguments(slurm_job.stages[0], "")
    python = f"{config.venv}/bin/python" if config.venv else "python"
    script = shlex.join([python, *stages.python_arguments(slurm_job.kind, paths.scripts_dir)])
    run = f'{shlex.quote(str(paths.slurm / "ranks.sh"))} {_container_command(config, paths)}{script} "${{arguments[@]}}"'
    job = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    lines += [
        'mkdir -p "$(dirname "$log")"',
        'exec >>"$log" 2>&1',
        f'echo "=== $(date --iso-8601=seconds) job {job} on $SLURM_JOB_NODELIST, restart ${{SLURM_RESTART_COUNT:-0}}"',
        run if config.scratch else f"exec {run}",
    ]
    return "\n".join(lines) + "\n"


def options(slurm_job: SlurmJob, config: ClusterConfig, paths: JobPaths) -> list[str]:
    """Return the options of sbatch, e.g. "nodes=1"."""
    on_accelerator = slurm_job.needs_accelerator
    nodes, tasks = nodes_and_ranks(slurm_job.num_ranks, config) if on_accelerator else (1, 1)
    limit = {"train": config.time_limit, "evaluate": config.evaluate_time_limit}
    partition = config.partition if on_accelerator else config.cpu_partition or config.partition
    memory = config.memory_per_node if on_accelerator else config.cpu_memory
    result = [f"job-name={slurm_job.name}", f"output={output(slurm_job, paths)}", "open-mode=append"]
    # After preemption or the loss of a node, Slurm requeues the job. The job resumes from the files on disk.
    result += ["requeue", f"time={limit.get(slurm_job.kind, config.cpu_time_limit)}"]
    result += [f"nodes={nodes}", f"ntasks-per-node={tasks}", f"cpus-per-task={config.cpus_per_task}"]
    if on_accelerator and config.gpus_per_node:
        gpu_type = f"{config.gpu_type}:" if config.gpu_type else ""
        gpus = 1 if config.gpu_binding == "task" else tasks
        result.append(f"gpus-per-{config.gpu_binding}={gpu_type}{gpus}")
    if slurm_job.kind in stages.MULTI_RANK_KINDS:
        result.append(f"signal=USR1@{config.signal_seconds}")
    names = {"partition": partition, "account": config.account, "qos": config.qos, "mem": memory}
    names |= {"constraint": config.constraint if on_accelerator else "", "reservation": config.reservation}
    result += [f"{name}={value}" for name, value in names.items() if value]
    if slurm_job.indices:
        running = f"%{config.max_running}" if config.max_running else ""
        result.append(f"array={_ranges(slurm_job.indices)}{running}")
    return result


def output(slurm_job: SlurmJob, paths: JobPaths) -> str:
    """Return the path for Slurm's own messages, e.g. logs/name-%j.out. Raises UserError if sbatch would misread it."""
    logs = str(paths.logs)
    if any(character.isspace() or character in "\"'\\%" for character in logs):
        raise UserError(f"{logs}: a batch script cannot write there; use a path without spaces, quotes and %")
    return f"{logs}/{slurm_job.name}-{'%A_%a' if slurm_job.indices else '%j'}.out"


def nodes_and_ranks(num_ranks: int, config: ClusterConfig) -> tuple[int, int]:
    """Return (number of nodes, ranks per node). Raises UserError if the ranks need several nodes and do not fill them."""
    per_node = config.max_ranks_per_node
    if num_ranks <= per_node:
        return 1, num_ranks
    if num_ranks % per_node:
        name = "GPUS_PER_NODE" if config.gpus_per_node else "TASKS_PER_NODE"
        raise UserError(
            f"num_ranks {num_ranks} does not fill nodes of {name} {per_node}; take a multiple of {per_node}, or at most {per_node}"
        )
    return num_ranks // per_node, per_node


def _stage_arguments(stage: Stage, indent: str) -> list[str]:
    flags = [f"{indent}    {shlex.quote(flag)}" for flag in stages.to_flags(stage.settings)]
    return [f"{indent}log={shlex.quote(str(stage.log))}", f"{indent}arguments=(", *flags, f"{indent})"]


def _container_command(config: ClusterConfig, paths: JobPaths) -> str:
    """Return the prefix that makes a command run in a container (for pyxis: options of srun), or "" without a container."""
    if not config.container:
        return ""
    if config.container_runtime == "pyxis":
        mount = f"{paths.directory}:{paths.directory}"
        flags = [f"--container-image={config.container}", f"--container-mounts={mount}"]
        return shlex.join([*flags, f"--container-workdir={paths.directory}"]) + " "
    nv = ["--nv"] if config.gpus_per_node else []
    bind = ["--bind", str(paths.directory), "--pwd", str(paths.directory)]
    return shlex.join([config.container_runtime, "exec", *nv, *bind, config.container]) + " "


def _ranges(indices: tuple[int, ...]) -> str:
    """Return indices in the form of sbatch --array, e.g. "0-3,5" for 0, 1, 2, 3, 5."""
    ranges = []
    for _, pairs in itertools.groupby(enumerate(sorted(indices)), lambda pair: pair[1] - pair[0]):
        numbers = [str(index) for _, index in pairs]
        ranges.append("-".join(dict.fromkeys([numbers[0], numbers[-1]])))
    return ",".join(ranges)
