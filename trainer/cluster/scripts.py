"""The text of a batch script: a pure function of a batch, the site, and where we are. No secrets, no job numbers.

Dependencies are given to sbatch when the numbers are known, so that a script can be read, compared and submitted again.
"""

from __future__ import annotations

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
    """Where jobs run: `directory` (absolute, shared by all nodes), and below it the tools, slurm/ and the job logs.

    `tools` is None if there is no repository: jobs then run the modules of the installed package.
    """

    directory: Path
    tools: Path | None
    slurm: Path
    logs: Path


def script_text(batch: SlurmJob, site: ClusterConfig, place: JobPaths) -> str:
    """The whole script. Raises UserError if the ranks do not fit the site's nodes."""
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH --{option}" for option in options(batch, site, place))]
    lines += ["set -euo pipefail", f"cd {shlex.quote(str(place.directory))}"]
    if site.modules:
        lines.append(f"module load {shlex.join(site.modules)}")
    if site.scratch:
        lines += [
            f"export TMPDIR={shlex.quote(site.scratch)}/job-$SLURM_JOB_ID",
            "export TRITON_CACHE_DIR=$TMPDIR/triton TORCH_EXTENSIONS_DIR=$TMPDIR/torch_extensions",
            "on_every_node=(srun --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 --cpus-per-task=1)",
            '"${on_every_node[@]}" mkdir -p "$TMPDIR"',
            """trap '"${on_every_node[@]}" rm -rf "$TMPDIR"' EXIT""",
        ]
    lines += _work(batch, place)
    script = shlex.join([*_interpreter(site), *stages.program(batch.kind, place.tools)])
    run = (
        f'{shlex.quote(str(place.slurm / "ranks.sh"))} {_container(site, place)}{script} "${{arguments[@]}}"'
    )
    job = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    lines += [
        'mkdir -p "$(dirname "$log")"',
        'exec >>"$log" 2>&1',
        f'echo "=== $(date --iso-8601=seconds) job {job} on $SLURM_JOB_NODELIST, restart ${{SLURM_RESTART_COUNT:-0}}"',
        run if site.scratch else f"exec {run}",
    ]
    return "\n".join(lines) + "\n"


def options(batch: SlurmJob, site: ClusterConfig, place: JobPaths) -> list[str]:
    """Options of sbatch, without dashes."""
    ranked = batch.holds_accelerator
    nodes, tasks = layout(batch.num_ranks, site) if ranked else (1, 1)
    limit = {"train": site.time_limit, "evaluate": site.evaluate_time_limit}
    partition = site.partition if ranked else site.cpu_partition or site.partition
    memory = site.memory_per_node if ranked else site.cpu_memory
    found = [f"job-name={batch.name}", f"output={output(batch, place)}", "open-mode=append"]
    # A job that is preempted, or whose node is lost, starts again and goes on from what is on disk.
    found += ["requeue", f"time={limit.get(batch.kind, site.cpu_time_limit)}"]
    found += [f"nodes={nodes}", f"ntasks-per-node={tasks}", f"cpus-per-task={site.cpus_per_task}"]
    if ranked and site.gpus_per_node:
        kind = f"{site.gpu_type}:" if site.gpu_type else ""
        per = ("task", 1) if site.gpu_binding == "task" else ("node", tasks)
        found.append(f"gpus-per-{per[0]}={kind}{per[1]}")
    if batch.kind in stages.RANKED:
        found.append(f"signal=USR1@{site.signal_seconds}")
    names = {"partition": partition, "account": site.account, "qos": site.qos, "mem": memory}
    names |= {"constraint": site.constraint if ranked else "", "reservation": site.reservation}
    found += [f"{name}={value}" for name, value in names.items() if value]
    if batch.indices:
        running = f"%{site.max_running}" if site.max_running else ""
        found.append(f"array={_ranges(batch.indices)}{running}")
    return found


def output(batch: SlurmJob, place: JobPaths) -> str:
    """Where Slurm writes what it has to say itself, with its own %A, %a and %j."""
    return _directive(place.logs / f"{batch.name}-{'%A_%a' if batch.indices else '%j'}.out")


def layout(num_ranks: int, site: ClusterConfig) -> tuple[int, int]:
    """(nodes, ranks on each): as few nodes as hold the ranks, all with the same number."""
    most = site.ranks_per_node
    if num_ranks <= most:
        return 1, num_ranks
    if num_ranks % most:
        name = "GPUS_PER_NODE" if site.gpus_per_node else "TASKS_PER_NODE"
        raise UserError(
            f"num_ranks {num_ranks} does not fill nodes of {name} {most}; take a multiple of {most}, or at most {most}"
        )
    return num_ranks // most, most


def _work(batch: SlurmJob, place: JobPaths) -> list[str]:
    """Sets `log` and `arguments`: by the array's task number, if it is an array."""
    if not batch.indices:
        return _one(batch.stages[0], "")
    lines = ['case "$SLURM_ARRAY_TASK_ID" in']
    for index, stage in zip(batch.indices, batch.stages, strict=True):
        lines += [f"{index})", *_one(stage, "    "), "    ;;"]
    return [*lines, "esac"]


def _one(stage: Stage, indent: str) -> list[str]:
    flags = [f"{indent}    {shlex.quote(flag)}" for flag in stages.to_flags(stage.settings)]
    return [f"{indent}log={shlex.quote(str(stage.log))}", f"{indent}arguments=(", *flags, f"{indent})"]


def _interpreter(site: ClusterConfig) -> list[str]:
    return [f"{site.venv}/bin/python" if site.venv else "python"]


def _container(site: ClusterConfig, place: JobPaths) -> str:
    """What stands between srun and the command. pyxis adds options to srun itself, the others are commands."""
    if not site.container:
        return ""
    if site.container_runtime == "pyxis":
        mount = f"{place.directory}:{place.directory}"
        flags = [f"--container-image={site.container}", f"--container-mounts={mount}"]
        return shlex.join([*flags, f"--container-workdir={place.directory}"]) + " "
    nv = ["--nv"] if site.gpus_per_node else []
    bind = ["--bind", str(place.directory), "--pwd", str(place.directory)]
    return shlex.join([site.container_runtime, "exec", *nv, *bind, site.container]) + " "


def _ranges(indices: tuple[int, ...]) -> str:
    """0-3,5 for 0 1 2 3 5."""
    parts: list[list[int]] = []
    for index in sorted(indices):
        if parts and parts[-1][-1] == index - 1:
            parts[-1] = [parts[-1][0], index]
        else:
            parts.append([index])
    return ",".join("-".join(str(end) for end in part) for part in parts)


def _directive(path: Path) -> str:
    """A path in an #SBATCH line, where Slurm expands % and reads spaces."""
    if any(character.isspace() or character in "\"'\\" for character in str(path)) or "%" in str(path.parent):
        raise UserError(
            f"{path.parent}: a batch script cannot write there; use a path without spaces, quotes and %"
        )
    return str(path)
