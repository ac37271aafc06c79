"""Wrappers of Slurm's commands; no other module runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import UserError
from trainer.runtime import distributed

# Columns of squeue --Format with their widths; only the reason may contain spaces.
_COLUMNS = {"JobArrayID": 40, "State": 20, "RestartCnt": 12, "TimeUsed": 20, "NodeList": 60, "Reason": 200}
_TIMEOUT_SECONDS = 120
ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"),
    *("PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
)


@dataclass(frozen=True)
class JobState:
    """State of a job or array task. `restarts`: None if unknown."""

    state: str
    reason: str = ""
    restarts: int | None = None
    nodes: str = ""
    time_used: str = ""

    @property
    def is_live(self) -> bool:
        return self.state not in ENDED


def check_installed() -> None:
    """Raise UserError if Slurm's commands are missing; it names the package to install."""
    missing = [
        name for name in ("sbatch", "squeue", "scontrol", "scancel", "sinfo") if not shutil.which(name)
    ]
    if missing:
        raise UserError(
            f"no {', '.join(missing)} on the PATH: log in to a node of the cluster, or install slurm-client; "
            "slurm/dev_cluster.sh makes a cluster on this machine (apt-get install slurm-wlm munge)"
        )


def submit_held(script: Path, dependency: str) -> str:
    """Submit a script on hold and return its job id; `release` starts it. Raises UserError with sbatch's message."""
    # Without --kill-on-invalid-dep a job whose dependency failed stays in the queue.
    after = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    return _run(["sbatch", "--parsable", "--hold", *after, str(script)]).strip().split(";")[0]


def release(ids: list[str]) -> None:
    _run(["scontrol", "release", *ids])


def jobs(ids: Iterable[str] = ()) -> dict[str, JobState]:
    """Return the user's jobs and array tasks by id from squeue; sacct adds those of `ids` that are no longer listed."""
    columns = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
    output = _run(["squeue", "--me", "--array", "--states=all", "--noheader", f"--Format={columns}"])
    found = {}
    for line in output.splitlines():
        cells, start = [], 0
        for width in _COLUMNS.values():
            cells.append(line[start : start + width].strip())
            start += width
        job, state, restarts, time_used, nodes, reason = cells
        reason = "" if reason == "None" else reason
        found[job] = JobState(state, reason, int(restarts) if restarts.isdigit() else None, nodes, time_used)
    missing_ids = [job for job in ids if job not in found]
    if missing_ids and shutil.which("sacct"):
        command = ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={','.join(missing_ids)}"]
        done = _finish([*command, "--format=JobID,State,ExitCode,NodeList"])
        if done.returncode == 0:  # else the cluster has no accounting database
            return {**parse_sacct(done.stdout), **found}
    return found


def parse_sacct(output: str) -> dict[str, JobState]:
    """Parse lines like `12_3|CANCELLED by 1000|0:15|n1`; the reason is "by 1000", or else the exit code."""
    found = {}
    for line in output.splitlines():
        job, state, code, nodes = line.split("|")
        name, _, details = state.partition(" ")
        reason = details or ("" if code in ("0:0", "") else f"exit code {code}")
        found[job] = JobState(name.rstrip("+"), reason, None, nodes)
    return found


def exit_code(job: str) -> str:
    """Return `1:0` (status:signal) of a job; "" if scontrol no longer lists it."""
    done = _finish(["scontrol", "--oneliner", "show", "job", job])
    words = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    return words.get("ExitCode", "") if done.returncode == 0 else ""


def cancel(ids: list[str]) -> None:
    _run(["scancel", *ids])


def partitions() -> dict[str, dict[str, str]]:
    """Return name -> {limit, gres, state} of every partition, with the gres of all its kinds of nodes."""
    found: dict[str, dict[str, str]] = {}
    for line in _run(["sinfo", "--noheader", "--format=%R|%l|%G|%a"]).splitlines():
        name, limit, gres, state = line.split("|")
        earlier = found.get(name, {}).get("gres", "")
        found[name] = {"limit": limit, "gres": f"{earlier},{gres}".strip(","), "state": state}
    return found


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
    # sbatch passes its environment to the job, so variables of an enclosing job must not be in it.
    inherited = distributed.without_launcher_variables(os.environ)
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    try:
        return subprocess.run(
            command, env={**inherited, **kept}, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
        )
    except FileNotFoundError:
        raise UserError(f"there is no {command[0]} on the PATH; this is for machines with Slurm") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} does not answer; is slurmctld up? (scontrol ping)") from None
