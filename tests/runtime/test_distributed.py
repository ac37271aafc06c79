"""Distributed environment under every launcher, and collectives on objects."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import run_well
from trainer.errors import UserError
from trainer.runtime.distributed import (
    DistributedEnvironment,
    device_index,
    environment_from_launcher,
    first_host,
    seconds_left_of_job,
    threads_per_rank,
)

ENVIRONMENTS = {
    "nothing": ({}, DistributedEnvironment(0, 1, 0, 1, "single")),
    "deepspeed": (
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"},
        DistributedEnvironment(3, 4, 1, 2, "env"),
    ),
    "torchrun": (
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        DistributedEnvironment(1, 2, 1, 2, "env"),
    ),
    "srun": (
        {
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": "5",
            "SLURM_NTASKS": "8",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        },
        DistributedEnvironment(5, 8, 1, 4, "slurm"),
    ),
    "srun, some of the job's tasks, on a smaller node": (
        {
            "SLURM_STEP_ID": "1",
            "SLURM_PROCID": "4",
            "SLURM_NTASKS": "16",
            "SLURM_STEP_NUM_TASKS": "5",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "1",
            "SLURM_STEP_TASKS_PER_NODE": "4,1",
        },
        DistributedEnvironment(4, 5, 0, 1, "slurm"),
    ),
    "torchrun, one srun task per node": (
        {
            **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            **{"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
        },
        DistributedEnvironment(5, 8, 1, 4, "env"),
    ),
    "mpich": (
        {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
        DistributedEnvironment(1, 2, 1, 2, "mpi"),
    ),
    "open mpi": (
        {
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        },
        DistributedEnvironment(1, 2, 0, 1, "mpi"),
    ),
}


@pytest.mark.parametrize("launcher", ENVIRONMENTS)
def test_environment_from_launcher(launcher: str) -> None:
    variables, expected = ENVIRONMENTS[launcher]
    assert environment_from_launcher(variables) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2 but WORLD_SIZE=2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"},
            "SLURM_NTASKS=4",
        ),
        (
            {
                **{"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
                **{"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
            },
            "RANK=0 but SLURM_PROCID=1",
        ),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "two"},
            "SLURM_STEP_TASKS_PER_NODE='two'",
        ),
    ],
)
def test_contradictions_are_named(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        environment_from_launcher(variables)


def test_a_tool_without_srun_in_a_job_of_several_tasks_is_refused() -> None:
    command = [
        sys.executable,
        "-c",
        "from trainer.runtime import distributed, terminal; terminal.run_main(distributed.initialize)",
    ]
    environment = {**os.environ, "SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "SLURM_NTASKS=2, but this process was not started by srun" in done.stderr


@pytest.mark.parametrize(
    ("visible", "devices"),
    [(1, [0, 0, 0, 0]), (4, [0, 1, 2, 3]), (2, [0, 1, 0, 1])],
    ids=["one per task", "all of the node", "two per task"],
)
def test_device_index(visible: int, devices: list[int]) -> None:
    assert [device_index(local_rank, visible) for local_rank in range(4)] == devices


def test_seconds_left_of_job() -> None:
    assert seconds_left_of_job({}) is None
    left = seconds_left_of_job({"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": str(int(time.time()) + 1000)})
    assert left is not None and 500 < left <= 1001


def test_ranks_of_a_node_share_the_cores() -> None:
    two_ranks = DistributedEnvironment(0, 2, 0, 2, "env")
    assert threads_per_rank({"OMP_NUM_THREADS": "3"}, two_ranks) == 3
    assert threads_per_rank({"SLURM_CPUS_PER_TASK": "7"}, two_ranks) == 7
    num_cores = threads_per_rank({}, DistributedEnvironment())
    assert threads_per_rank({}, two_ranks) == max(1, num_cores // 2)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-07,12],login", "gpu03"), ("a[1,3]-ib", "a1-ib")],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


RANKS = """
from trainer.runtime import distributed
environment = distributed.initialize()
rank, world_size = environment.rank, environment.world_size
assert distributed.gather_objects(rank) == list(range(world_size))
assert distributed.broadcast_object(rank) == 0
distributed.barrier()
try:
    distributed.raise_on_all_ranks("it broke" if rank == world_size - 1 else None)
except distributed.UserError as error:
    print(f"{environment.launcher} {world_size} {error}", flush=True)  # one write: ranks share the pipe
distributed.shutdown()
"""


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_by_environment(num_ranks: int) -> None:
    message = "it broke" if num_ranks == 1 else "rank 1: it broke"
    assert f"env {num_ranks} {message}" in run_well(["-c", RANKS], num_ranks)


def test_ranks_under_mpiexec() -> None:
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists() and not shutil.which("mpiexec"):
        pytest.skip("no mpiexec; install the mpi extra")
    command = [str(mpiexec) if mpiexec.exists() else "mpiexec", "-n", "2", sys.executable, "-c", RANKS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mpi 2 rank 1: it broke") == 2, done.stdout + done.stderr
