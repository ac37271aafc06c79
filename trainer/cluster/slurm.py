"""Wrappers of the Slurm commands that submit, list and cancel jobs and list partitions."""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trainer.errors import UserError
from trainer.runtime import distributed

# Columns of squeue --Format and their widths in characters.
_COLUMNS = {"JobArrayID": 40, "State": 20, "RestartCnt": 12, "TimeUsed": 20, "NodeList": 60, "Reason": 200}
_TIMEOUT_SECONDS = 120
ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"),
    *("PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
)


@dataclass(frozen=True)
class JobState:
    """State of a job or of a task of a job array."""

    state: str
    reason: str = ""
    restarts: int | None = None  # None if unknown
    nodes: str = ""
    time_used: str = ""

    @property
    def is_live(self) -> bool:
        return self.state not in ENDED


def check_installed() -> None:
    """Raise UserError, with the packages to install, if a command of Slurm is missing."""
    commands = ("sbatch", "squeue", "scontrol", "scancel", "sinfo")
    if missing := [name for name in commands if not shutil.which(name)]:
        raise UserError(
            f"no {', '.join(missing)} on the PATH: log in to a node of the cluster, or install slurm-client; "
            "slurm/dev_cluster.sh makes a cluster on this machine (apt-get install slurm-wlm munge)"
        )


def submit_held(script: Path, dependency: str) -> str:
    """Submit a held job and return its id. `release` lets the job start. Raises UserError if sbatch rejects it."""
    # Without --kill-on-invalid-dep, a job whose dependency failed stays in the queue.
    flags = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    return _run(["sbatch", "--parsable", "--hold", *flags, str(script)]).strip().split(";")[0]


def release(ids: list[str]) -> None:
    _run(["scontrol", "release", *ids])


def jobs(ids: Iterable[str] = ()) -> dict[str, JobState]:
    """Return {job id: state}: the user's jobs and array tasks from squeue, and the jobs in `ids` that only sacct lists."""
    columns = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
    output = _run(["squeue", "--me", "--array", "--states=all", "--noheader", f"--Format={columns}"])
    ends = list(itertools.accumulate(_COLUMNS.values()))
    listed = {}
    for line in output.splitlines():
        cells = [line[start:end].strip() for start, end in itertools.pairwise([0, *ends])]
        job, state, restarts, time_used, nodes, reason = cells
        reason = "" if reason == "None" else reason
        listed[job] = JobState(state, reason, int(restarts) if restarts.isdigit() else None, nodes, time_used)
    missing_ids = [job for job in ids if job not in listed]
    if missing_ids and shutil.which("sacct"):
        command = ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={','.join(missing_ids)}"]
        done = _finish([*command, "--format=JobID,State,ExitCode,NodeList"])
        if done.returncode == 0:  # sacct fails if the cluster has no accounting database
            return {**parse_sacct(done.stdout), **listed}
    return listed


def parse_sacct(output: str) -> dict[str, JobState]:
    """Return {job id: state} from lines like `12_3|CANCELLED by 1000|0:15|n1`.

    The reason is the text after the state ("by 1000"). If this text is missing, the reason is the exit code, unless 0:0.
    """
    states = {}
    for line in output.splitlines():
        job, state, code, nodes = line.split("|")
        name, _, details = state.partition(" ")
        reason = details or ("" if code in ("0:0", "") else f"exit code {code}")
        states[job] = JobState(name.rstrip("+"), reason, None, nodes)
    return states


def exit_code(job: str) -> str:
    """Return the exit code of a job as status:signal, e.g. `1:0`; "" if scontrol does not list the job."""
    done = _finish(["scontrol", "--oneliner", "show", "job", job])
    words = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    return words.get("ExitCode", "") if done.returncode == 0 else ""


def cancel(ids: list[str]) -> None:
    _run(["scancel", *ids])


class Partition(NamedTuple):
    time_limit: str
    gres: str  # GRES of each node type of the partition, joined by commas
    state: str


def partitions() -> dict[str, Partition]:
    """Return {name: partition} of all partitions of the cluster."""
    by_name: dict[str, Partition] = {}
    for line in _run(["sinfo", "--noheader", "--format=%R|%l|%G|%a"]).splitlines():
        name, limit, gres, state = line.split("|")
        earlier = f"{by_name[name].gres}," if name in by_name else ""
        by_name[name] = Partition(limit, f"{earlier}{gres}".strip(","), state)
    return by_name


def default_partition() -> str:
    names = [line.strip() for line in _run(["sinfo", "--noheader", "--format=%P"]).splitlines()]
    return next((name[:-1] for name in names if name.endswith("*")), "")


def _run(command: list[str]) -> str:
    done = _finish(command)
    if done.returncode != 0:
        message = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"{command[0]}: {message.removeprefix(f'{command[0]}: ')}")
    return done.stdout


def _finish(command: list[str]) -> subprocess.CompletedProcess[str]:
    # sbatch passes its environment to the new job, so variables of the current job must be removed.
    env = distributed.without_launcher_variables(os.environ, keep=("SLURM_CONF",))
    try:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except FileNotFoundError:
        raise UserError(f"there is no {command[0]} on the PATH; this is for machines with Slurm") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} does not answer; is slurmctld up? (scontrol ping)") from None
