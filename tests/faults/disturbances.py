"""What happens to jobs on a cluster, done to a real Slurm: each function disturbs once and returns what it did.

They do what others do to a job, and nothing in the job's processes: a kill, a stop, a lost node, another job.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.slurm_cluster import Cluster

Disturbance = Callable[[Cluster, random.Random], str]

_NODE_AWAY_SECONDS = 15.0  # longer than the cluster's SlurmdTimeout (DEV_CLUSTER_NODE_LOST)
_CONTROLLER_AWAY_SECONDS = 5.0
_RANKED = ("train", "evaluate")


def preempt(cluster: Cluster, choice: random.Random) -> str:
    """A job of higher priority takes both nodes for a moment."""
    cluster.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    return "preempted by a job of a higher partition"


def kill_rank(cluster: Cluster, choice: random.Random) -> str:
    return f"rank {_signal_rank(cluster, choice, signal.SIGKILL)} killed (SIGKILL)"


def stop_rank(cluster: Cluster, choice: random.Random) -> str:
    return f"rank {_signal_rank(cluster, choice, signal.SIGSTOP)} stopped (SIGSTOP)"


def kill_launcher(cluster: Cluster, choice: random.Random) -> str:
    """srun, in the batch script, dies and leaves its tasks to Slurm."""
    parents = [ancestor for rank in _ranks(cluster) for ancestor in _other_processes_of_job(rank)]
    launchers = [process for process in parents if process.name() == "srun"]
    if not launchers:
        raise LookupError("no srun")
    choice.choice(sorted(launchers, key=lambda process: process.pid)).kill()
    return "srun killed (SIGKILL)"


def lose_node(cluster: Cluster, choice: random.Random) -> str:
    """Its slurmd and all its processes are gone, and come back after Slurm has noticed."""
    node = choice.choice(["n1", "n2"])
    cluster.lose_node(node)
    time.sleep(_NODE_AWAY_SECONDS)
    cluster.revive_node(node)
    return f"node {node} lost, and back after {_NODE_AWAY_SECONDS:.0f} s"


def restart_controller(cluster: Cluster, choice: random.Random) -> str:
    cluster.kill_controller()
    time.sleep(_CONTROLLER_AWAY_SECONDS)
    cluster.start_controller()
    return f"slurmctld killed, and back after {_CONTROLLER_AWAY_SECONDS:.0f} s"


def ask_to_stop(cluster: Cluster, choice: random.Random) -> str:
    """By hand, as before a maintenance."""
    name = choice.choice(["USR1", "TERM"])
    cluster.run("scancel", f"--signal={name}", "--partition=low", "--state=RUNNING")
    return f"scancel --signal={name}"


def cancel(cluster: Cluster, choice: random.Random) -> str:
    """Somebody cancels what runs; it stays cancelled until it is submitted again."""
    cluster.run("scancel", "--partition=low", "--state=RUNNING")
    return "cancelled"


def fill_disk(disk: Path) -> Disturbance:
    """Fills the file system of `disk` until a running job has ended, or for half a minute; then makes room again."""

    def fill(cluster: Cluster, choice: random.Random) -> str:
        ballast = disk / "ballast"
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        try:
            with contextlib.suppress(OSError), open(ballast, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, free)
            deadline = time.monotonic() + 30
            while cluster.ranks("train") and time.monotonic() < deadline:
                time.sleep(0.5)
        finally:
            ballast.unlink(missing_ok=True)
        return "disk full"

    return fill


DISTURBANCES: tuple[Disturbance, ...] = (
    preempt,
    kill_rank,
    stop_rank,
    kill_launcher,
    lose_node,
    restart_controller,
    ask_to_stop,
    cancel,
)


def mount(folder: Path, num_bytes: int) -> bool:
    """A small file system in memory at `folder`; False where we may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], capture_output=True)


def _ranks(cluster: Cluster) -> list[psutil.Process]:
    """Those that train or evaluate. Raises LookupError if nobody does at the moment."""
    found = [process for tool in _RANKED for process in cluster.ranks(tool)]
    if not found:
        raise LookupError("no ranks")
    return found


def _signal_rank(cluster: Cluster, choice: random.Random, number: signal.Signals) -> int:
    """Raises LookupError if the rank has ended meanwhile."""
    rank = choice.choice(_ranks(cluster))
    try:
        place = int(rank.environ().get("SLURM_PROCID", 0))
        rank.send_signal(number)
    except psutil.Error:
        raise LookupError("it has ended") from None
    return place


def _other_processes_of_job(rank: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        job = rank.environ().get("SLURM_JOB_ID")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_JOB_ID") == job:
                    found.append(process)
        return found
    return []
