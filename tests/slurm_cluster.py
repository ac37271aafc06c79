"""Fixture `cluster`: a real two-node Slurm cluster from slurm/dev_cluster.sh, shared by the whole session."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from trainer.cluster.slurm import ENDED
from trainer.runtime import distributed

REPOSITORY = Path(__file__).resolve().parent.parent
DEV_CLUSTER = REPOSITORY / "slurm" / "dev_cluster.sh"
MISSING_PACKAGES = 3  # exit status of dev_cluster.sh
PATIENCE_SECONDS = 300.0  # for a loaded machine


@dataclass(frozen=True)
class Cluster:
    """Slurm cluster in `folder`, with methods that run commands on it."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        ours = distributed.without_launcher_variables(os.environ)
        conf = {"SLURM_CONF": str(self.folder / "slurm.conf"), "DEV_CLUSTER_DIR": str(self.folder)}
        return {**ours, **conf, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}

    def run(self, *command: str | Path, cwd: Path = REPOSITORY, **environment: str) -> tuple[int, str]:
        """Run a command and return its exit status and output."""
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        return done.returncode, done.stdout

    def run_well(self, *command: str | Path, cwd: Path = REPOSITORY, **environment: str) -> str:
        status, output = self.run(*command, cwd=cwd, **environment)
        assert status == 0, output
        return output

    def sbatch(self, *arguments: str | Path, cwd: Path = REPOSITORY) -> str:
        """Submit a job and return its number."""
        return self.run_well("sbatch", "--parsable", *arguments, cwd=cwd).strip()

    def fact(self, job: str, name: str) -> str:
        """Return a field of `scontrol show job`, e.g. JobState; "" if Slurm has no record of the job."""
        _, output = self.run("scontrol", "--oneliner", "show", "job", job)
        words = (word.partition("=") for word in output.split())
        return next((value for key, _, value in words if key == name), "")

    def wait(self, until: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Poll until `until()` is true. Raises AssertionError with `what` and the queue after `seconds`."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"not within {seconds} s: {what}\n{self.run('squeue', '--states=all')[1]}"
                )
            time.sleep(0.2)

    def wait_for_state(self, job: str, state: str) -> None:
        """Wait until the job has this state; fail immediately if it ends in another one."""
        current = ""

        def has_state_or_ended() -> bool:
            nonlocal current
            current = self.fact(job, "JobState")
            return current == state or current in ENDED

        self.wait(has_state_or_ended, f"job {job} {state}")
        assert current == state, self.run("scontrol", "show", "job", job)[1]

    def start_now(self, job: str) -> None:
        """Start a requeued job without Slurm's delay of two minutes, after the few seconds that are needed.

        A slurmd that ended a job refuses to launch it again in the same second ("already killed").
        """
        self.wait(lambda: self.fact(job, "JobState") == "PENDING", f"job {job} is back in the queue", 60)
        time.sleep(2.5)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def lose_node(self, node: str) -> None:
        """Kill a node's slurmd and all its processes, as if its power were cut."""
        doomed = [psutil.Process(int((self.folder / node / "slurmd.pid").read_text()))]
        log = str(self.folder / "logs" / f"slurmd-{node}.log")
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name() == "slurmstepd" and log in [file.path for file in process.open_files()]:
                    doomed += [process, *process.children(recursive=True)]
        for process in doomed:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def revive_node(self, node: str) -> None:
        self.run_well(
            "/usr/sbin/slurmd", "-N", node, "-f", self.folder / "slurm.conf", DEV_CLUSTER_OF=str(self.folder)
        )
        self.wait(lambda: self.node_state(node) in ("idle", "mixed", "allocated"), f"{node} is back")

    def node_state(self, node: str) -> str:
        """Return idle, mixed, allocated, down, ...; with `*` if the node does not respond."""
        return self.run_well(
            "sinfo", "--noheader", f"--nodes={node}", "--partition=low", "--format=%T"
        ).strip()

    def kill_controller(self) -> None:
        psutil.Process(int((self.folder / "state" / "slurmctld.pid").read_text())).kill()

    def start_controller(self) -> None:
        """Start slurmctld, which restores its saved state, and wait until it answers."""
        self.run_well(
            "/usr/sbin/slurmctld", "-f", self.folder / "slurm.conf", DEV_CLUSTER_OF=str(self.folder)
        )
        self.wait(lambda: "is UP" in self.run("scontrol", "ping")[1], "slurmctld answers")

    def ranks(self, tool: str) -> list[psutil.Process]:
        """Return the processes of `python tools/<tool>.py` in this cluster's jobs, by rank."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # a process may end during the inspection
                words, environment = process.cmdline(), process.environ()
                is_rank = len(words) > 1 and "python" in words[0] and words[1].endswith(f"tools/{tool}.py")
                if is_rank and environment.get("SLURM_CONF") == str(self.folder / "slurm.conf"):
                    found.append((int(environment.get("SLURM_PROCID", 0)), process.pid, process))
        return [process for _, _, process in sorted(found)]

    def processes(self) -> list[str]:
        """Return all processes of this cluster: daemons, jobs and tasks."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                text = " ".join([process.cwd(), *process.environ().values()])
                if process.status() != psutil.STATUS_ZOMBIE and str(self.folder) in text:
                    found.append(f"{process.pid} {process.cmdline()}")
        return found


def start_cluster(folder: Path, **environment: str) -> Cluster:
    """Start a cluster in `folder`; skip the test, naming the missing packages, if Slurm is not installed."""
    cluster = Cluster(folder)
    status, output = cluster.run(DEV_CLUSTER, "up", **environment)
    if status == MISSING_PACKAGES:
        pytest.skip(output.strip())
    assert status == 0, output
    return cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    # Not in pytest's folders: the path of a socket has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    short = {"DEV_CLUSTER_GRACE": "120", "DEV_CLUSTER_KILL_WAIT": "10", "DEV_CLUSTER_NODE_LOST": "10"}
    started = None
    try:
        started = start_cluster(folder, **short)
        yield started
    finally:
        if started:
            started.run_well(DEV_CLUSTER, "down")
        shutil.rmtree(folder, ignore_errors=True)
