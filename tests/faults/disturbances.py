"""Disturbances of jobs on a real Slurm: each function causes one from outside and returns its description."""

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
    """Kill srun in the batch script; Slurm ends its tasks."""
    processes = [process for rank in _ranks(cluster) for process in _processes_of_job(rank)]
    launchers = [process for process in processes if process.name() == "srun"]
    if not launchers:
        raise LookupError("no srun")
    choice.choice(sorted(launchers, key=lambda process: process.pid)).kill()
    return "srun killed (SIGKILL)"


def lose_node(cluster: Cluster, choice: random.Random) -> str:
    """Kill a node's slurmd and all its processes, and start slurmd again after Slurm has noticed."""
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


def send_stop_signal(cluster: Cluster, choice: random.Random) -> str:
    """Send the signal that operators use before a maintenance."""
    name = choice.choice(["USR1", "TERM"])
    cluster.run("scancel", f"--signal={name}", "--partition=low", "--state=RUNNING")
    return f"scancel --signal={name}"


def cancel(cluster: Cluster, choice: random.Random) -> str:
    """Cancel the running jobs, which stay cancelled until they are submitted again."""
    cluster.run("scancel", "--partition=low", "--state=RUNNING")
    return "cancelled"


def fill_disk(disk: Path) -> Disturbance:
    """Return a disturbance that fills the file system of `disk` until the ranks have ended, at most 30 s."""

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
    send_stop_signal,
    cancel,
)


def mount(folder: Path, num_bytes: int) -> bool:
    """Mount a small file system in memory at `folder`; return False without permission."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], capture_output=True)


def _ranks(cluster: Cluster) -> list[psutil.Process]:
    """Return the ranks of trainings and evaluations. Raises LookupError without any."""
    found = [process for tool in _RANKED for process in cluster.ranks(tool)]
    if not found:
        raise LookupError("no ranks")
    return found


def _signal_rank(cluster: Cluster, choice: random.Random, number: signal.Signals) -> int:
    """Send a signal to a random rank and return its number. Raises LookupError if it has ended meanwhile."""
    process = choice.choice(_ranks(cluster))
    try:
        rank = int(process.environ().get("SLURM_PROCID", 0))
        process.send_signal(number)
    except psutil.Error:
        raise LookupError("it has ended") from None
    return rank


def _processes_of_job(rank: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        job = rank.environ().get("SLURM_JOB_ID")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_JOB_ID") == job:
                    found.append(process)
        return found
    return []
