"""A real two-node Slurm for tests, made by slurm/dev_cluster.sh; `cluster` is a fixture, shared by the whole session."""

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
PATIENCE_SECONDS = 300.0  # with a loaded machine


@dataclass(frozen=True)
class Cluster:
    """Runs Slurm's commands and ours on the cluster of `folder`."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        ours = distributed.without_launcher_variables(os.environ)
        conf = {"SLURM_CONF": str(self.folder / "slurm.conf"), "DEV_CLUSTER_DIR": str(self.folder)}
        return {**ours, **conf, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}

    def run(self, *command: str | Path, cwd: Path = REPOSITORY, **environment: str) -> tuple[int, str]:
        """Exit status and output of a command."""
        done = subprocess.run(
            [str(part) for part in command],
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
        """Submit; returns the job's number."""
        return self.run_well("sbatch", "--parsable", *arguments, cwd=cwd).strip()

    def fact(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, e.g. JobState; "" if Slurm has forgotten the job."""
        _, output = self.run("scontrol", "--oneliner", "show", "job", job)
        words = (word.partition("=") for word in output.split())
        return next((value for key, _, value in words if key == name), "")

    def wait(self, until: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Poll until it is true; a failure tells `what` and what the cluster is doing."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"not within {seconds} s: {what}\n{self.run('squeue', '--states=all')[1]}"
                )
            time.sleep(0.2)

    def wait_for_state(self, job: str, state: str) -> None:
        """A job that ended otherwise is a failure at once."""
        seen = [""]

        def look() -> bool:
            seen[0] = self.fact(job, "JobState")
            return seen[0] == state or seen[0] in ENDED

        self.wait(look, f"job {job} {state}")
        assert seen[0] == state, self.run("scontrol", "show", "job", job)[1]

    def start_now(self, job: str) -> None:
        """Slurm makes a requeued job wait for two minutes; some seconds it does need.

        A slurmd that ended a job refuses to launch it again in the same second ("already killed").
        """
        self.wait(lambda: self.fact(job, "JobState") == "PENDING", f"job {job} is back in the queue", 60)
        time.sleep(2.5)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def lose_node(self, node: str) -> None:
        """Kill a node's slurmd and everything it started, as if its power were cut."""
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
        """idle, mixed, allocated, down, ...; with `*` if it does not answer."""
        return self.run_well(
            "sinfo", "--noheader", f"--nodes={node}", "--partition=low", "--format=%T"
        ).strip()

    def kill_controller(self) -> None:
        psutil.Process(int((self.folder / "state" / "slurmctld.pid").read_text())).kill()

    def start_controller(self) -> None:
        """It reads what it had saved."""
        self.run_well(
            "/usr/sbin/slurmctld", "-f", self.folder / "slurm.conf", DEV_CLUSTER_OF=str(self.folder)
        )
        self.wait(lambda: "is UP" in self.run("scontrol", "ping")[1], "slurmctld answers")

    def ranks(self, tool: str) -> list[psutil.Process]:
        """Processes of `python tools/<tool>.py` in this cluster's jobs, by rank."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # it may end while it is looked at
                words, environment = process.cmdline(), process.environ()
                is_rank = len(words) > 1 and "python" in words[0] and words[1].endswith(f"tools/{tool}.py")
                if is_rank and environment.get("SLURM_CONF") == str(self.folder / "slurm.conf"):
                    found.append((int(environment.get("SLURM_PROCID", 0)), process.pid, process))
        return [process for _, _, process in sorted(found)]

    def processes(self) -> list[str]:
        """Everything that belongs to this cluster, whether daemon, job or task."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                places = " ".join([process.cwd(), *process.environ().values()])
                if process.status() != psutil.STATUS_ZOMBIE and str(self.folder) in places:
                    found.append(f"{process.pid} {process.cmdline()}")
        return found


def make(folder: Path, **environment: str) -> Cluster:
    """Start a cluster in `folder`. Skips the test if Slurm is not installed, saying what to install."""
    cluster = Cluster(folder)
    status, output = cluster.run(DEV_CLUSTER, "up", **environment)
    if status == MISSING_PACKAGES:
        pytest.skip(output.strip())
    assert status == 0, output
    return cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    # Not below pytest's folders: a socket's path has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    short = {"DEV_CLUSTER_GRACE": "120", "DEV_CLUSTER_KILL_WAIT": "10", "DEV_CLUSTER_NODE_LOST": "10"}
    made = None
    try:
        made = make(folder, **short)
        yield made
    finally:
        if made:
            made.run_well(DEV_CLUSTER, "down")
        shutil.rmtree(folder, ignore_errors=True)
