"""slurm/dev_cluster.sh and slurm/ranks.sh on a real Slurm, with shell commands instead of tools."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm_cluster import DEV_CLUSTER, MISSING_PACKAGES, REPOSITORY, Cluster, start_cluster

RANKS = REPOSITORY / "slurm" / "ranks.sh"
# A rank that saves on a signal, or runs for a minute.
SAVES = 'trap "echo saved; exit 75" TERM USR1; echo started; for i in $(seq 600); do sleep 0.1; done'


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """Return a cluster for one test, not started yet, and remove it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    cluster = Cluster(folder)
    yield cluster
    cluster.run(DEV_CLUSTER, "down")
    shutil.rmtree(folder, ignore_errors=True)


def batch(folder: Path, *lines: str) -> Path:
    """Write a batch script in `folder` that prints to out.txt, with a line at each start."""
    options = ["open-mode=append", "requeue", f"output={folder}/out.txt", "ntasks-per-node=1", "nodes=2"]
    script = folder / "job.sbatch"
    head = ["#!/usr/bin/env bash", *(f"#SBATCH --{option}" for option in options)]
    script.write_text("\n".join([*head, "echo restart ${SLURM_RESTART_COUNT:-0}", *lines]) + "\n")
    return script


def printed(folder: Path) -> str:
    file = folder / "out.txt"
    return file.read_text() if file.exists() else ""


def preempt(cluster: Cluster) -> None:
    """Run a short job in the partition "high" that needs both nodes."""
    cluster.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")


def test_up_status_down_and_nothing_is_left(own_cluster: Cluster) -> None:
    start_cluster(own_cluster.folder)
    assert "already up" in own_cluster.run_well(DEV_CLUSTER, "up")
    assert "low*" in own_cluster.run_well(DEV_CLUSTER, "status")
    job = own_cluster.sbatch("--nodes=2", "--output=/dev/null", "--wrap=srun sleep 1000")
    own_cluster.wait_for_state(job, "RUNNING")
    own_cluster.wait(lambda: len(own_cluster.processes()) > 4, "tasks run")
    own_cluster.run_well(DEV_CLUSTER, "down")
    assert own_cluster.processes() == []
    assert not (own_cluster.folder / "slurm.conf").exists()
    assert own_cluster.run(DEV_CLUSTER, "status")[0] == 1


def test_missing_packages_are_named(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "id", "env"):
        (tools / name).symlink_to(shutil.which(name) or name)
    environment = {"PATH": str(tools), "DEV_CLUSTER_DIR": str(tmp_path / "c"), "DEV_CLUSTER_SBIN": ""}
    status, output = Cluster(tmp_path / "c").run(DEV_CLUSTER, "up", **environment)
    assert status == MISSING_PACKAGES
    assert output == (
        "error: missing packages: slurmctld slurmd slurm-client munge; "
        "on Debian or Ubuntu: apt-get install slurm-wlm munge\n"
    )


def test_a_preempted_job_asks_for_its_requeue(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch(
        batch(tmp_path, f"exec {RANKS} bash -c '[[ $SLURM_RESTART_COUNT ]] || {{ {SAVES}; }}'")
    )
    cluster.wait(lambda: printed(tmp_path).count("started") == 2, "both ranks run")
    preempt(cluster)
    cluster.wait(lambda: "the job is requeued" in printed(tmp_path), "the job is requeued")
    cluster.start_now(job)
    cluster.wait_for_state(job, "COMPLETED")
    assert printed(tmp_path).count("saved") == 2
    assert "restart 0" in printed(tmp_path) and "restart 1" in printed(tmp_path)
    assert cluster.fact(job, "Restarts") == "1"


def test_only_the_preempted_task_of_an_array_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    inner = f"[[ $SLURM_ARRAY_TASK_ID = 2 || $SLURM_RESTART_COUNT ]] || {{ {SAVES}; }}"
    job = cluster.sbatch("--array=1-2", batch(tmp_path, f"exec {RANKS} bash -c '{inner}'"))
    cluster.wait_for_state(f"{job}_2", "COMPLETED")
    cluster.wait(lambda: printed(tmp_path).count("started") == 2, "both ranks of task 1 run")
    preempt(cluster)
    cluster.wait(lambda: "the job is requeued" in printed(tmp_path), "task 1 is requeued")
    cluster.start_now(f"{job}_1")
    cluster.wait_for_state(f"{job}_1", "COMPLETED")
    assert cluster.fact(f"{job}_2", "Restarts") == "0"
    assert printed(tmp_path).count("restart 1") == 1


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch(batch(tmp_path, f"exec {RANKS} bash -c '{SAVES}'"))
    cluster.wait(lambda: printed(tmp_path).count("started") == 2, "both ranks run")
    cluster.run_well("scancel", job)
    cluster.wait_for_state(job, "CANCELLED")
    assert cluster.fact(job, "Restarts") == "0"
    assert "is requeued" not in printed(tmp_path)


# Reactions of the other rank to srun's SIGTERM: saves (training), fails (import), is killed.
OTHERS = {"saves": "trap 'exit 75' TERM", "fails too": "trap 'exit 1' TERM", "is ended": ":"}


def one_rank_fails(how: str, other: str) -> str:
    """Return a script in which rank 1 fails after a second, and rank 0 reacts to the signal."""
    other = f"{OTHERS[other]}; for i in $(seq 600); do sleep 0.1; done"
    return f"[[ ! ${{SLURM_RESTART_COUNT:-}} ]] || exit 0; if [[ $SLURM_PROCID = 1 ]]; then sleep 1; {how}; fi; {other}"


@pytest.mark.parametrize("other", OTHERS)
def test_a_failed_job_is_not_started_again(cluster: Cluster, tmp_path: Path, other: str) -> None:
    """Even if the other rank, which srun ends, exits with the status for a requeue."""
    (tmp_path / "rank").write_text(one_rank_fails("exit 2", other))
    job = cluster.sbatch(batch(tmp_path, f"exec {RANKS} bash {tmp_path}/rank"))
    cluster.wait_for_state(job, "FAILED")
    assert cluster.fact(job, "Restarts") == "0"
    assert cluster.fact(job, "ExitCode") == "2:0"


@pytest.mark.parametrize(
    ("how", "other", "reason"),
    [("kill -KILL $$", "saves", "a rank was killed"), ("exit 76", "fails too", "a rank was lost")],
)
def test_a_job_that_lost_a_rank_goes_on(
    cluster: Cluster, tmp_path: Path, how: str, other: str, reason: str
) -> None:
    """A rank that was killed, or whose connection was lost."""
    (tmp_path / "rank").write_text(one_rank_fails(how, other))
    job = cluster.sbatch(batch(tmp_path, f"exec {RANKS} bash {tmp_path}/rank"))
    cluster.wait(lambda: f"{reason}, the job is requeued" in printed(tmp_path), "the job is requeued")
    cluster.start_now(job)
    cluster.wait_for_state(job, "COMPLETED")
    assert cluster.fact(job, "Restarts") == "1"


def test_a_rank_that_is_killed_again_and_again_ends_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """Otherwise a conversion without enough memory would restart forever."""
    many = "export SLURM_RESTART_COUNT=10"  # as set by Slurm
    job = cluster.sbatch(batch(tmp_path, many, f"exec {RANKS} bash -c 'kill -KILL $$'"))
    cluster.wait_for_state(job, "FAILED")
    assert cluster.fact(job, "Restarts") == "0" and cluster.fact(job, "ExitCode") == "137:0"


def test_slurms_own_warning_before_the_time_limit_is_heard(cluster: Cluster, tmp_path: Path) -> None:
    """--signal is nearly as long as the limit of a minute, so that Slurm, which polls, sends the signal early."""
    script = batch(tmp_path, f"exec {RANKS} bash -c '{SAVES}'")
    job = cluster.sbatch("--time=00:01:00", "--signal=USR1@58", script)
    cluster.wait(lambda: "ranks.sh: stop requested" in printed(tmp_path), "the job gets the signal and saves")
    assert "the job is requeued" in printed(tmp_path), printed(tmp_path)
    cluster.run_well("scancel", job)
    assert printed(tmp_path).count("saved") == 2


LEFT = "import os; from trainer.runtime.distributed import seconds_left_of_job as left; print('left', left(os.environ))"


def test_a_job_reads_its_time_limit_and_the_address_of_rank_0(cluster: Cluster, tmp_path: Path) -> None:
    """The node names of this cluster are not host names, so rank 0 must be found by address."""
    python = cluster.environment["PYTHON"]
    ask = "import os; from trainer.runtime import distributed as d; print('at', d._master_address(os.environ, d.environment_from_launcher(os.environ))[0])"
    output = cluster.run_well("srun", "--nodes=2", "--time=00:30:00", python, "-c", f"{LEFT}\n{ask}")
    left = [float(line.split()[1]) for line in output.splitlines() if line.startswith("left")]
    assert len(left) == 2 and all(1000 < seconds <= 1800 for seconds in left), output
    assert output.count("at 127.0.0.1") == 2


def test_contradictory_ranks_are_refused_by_every_rank(cluster: Cluster, tmp_path: Path) -> None:
    """RANK and WORLD_SIZE of the shell are inherited by every task."""
    python = cluster.environment["PYTHON"]
    flags = ["--train_shards=none", "--config_name=stories-0.2m", f"--output_dir={tmp_path}/run"]
    leftover = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    status, output = cluster.run("srun", "--nodes=2", python, "tools/train.py", *flags, **leftover)
    assert status == 2
    assert "RANK=0 but SLURM_PROCID=1: RANK was left over in the environment" in output
    assert not os.path.exists(tmp_path / "run" / "metrics.jsonl")


DRAW_BATCHES = """
from trainer.runtime import distributed
distributed.initialize()
from trainer.evaluation.work_queue import COUNTER_NAMES
from trainer.runtime.shared_counter import shared_counter
with shared_counter(COUNTER_NAMES) as counter:
    drawn = [counter.add("next_chunk", 1) for _ in range(5)]
all_drawn = distributed.gather_objects(drawn)
if distributed.is_main_process():
    print(type(counter).__name__, sorted(sum(all_drawn, [])))
distributed.shutdown()
"""


@pytest.mark.parametrize("mpi", ["none", "pmi2"])
def test_the_work_queue_uses_tcp_with_any_mpi_of_srun(cluster: Cluster, mpi: str) -> None:
    srun = ["srun", f"--mpi={mpi}", "--nodes=2"]
    output = cluster.run_well(*srun, cluster.environment["PYTHON"], "-c", DRAW_BATCHES)
    assert f"StoreCounter {list(range(10))}" in output, output


def test_the_doctor_checks_every_node_of_a_job(cluster: Cluster, tmp_path: Path) -> None:
    """As a batch job, without the slow checks, which tests/doctor runs; each node counts as a machine."""
    layout = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/doctor.out"]
    flags = [f"--output_dir={tmp_path}/runs", "--min_free_gb=0", "--skip", "parity", "mpi"]
    job = cluster.sbatch(*layout, "slurm/doctor.sbatch", *flags)
    cluster.wait_for_state(job, "COMPLETED")
    reason = (tmp_path / "doctor.out").read_text()
    assert f"slurm: environment: job {job}, 2 rank(s) by slurm" in reason, reason
    assert "between 2 ranks on 1 machine" in reason and "2 ranks (" in reason, "the nodes reach each other"
    assert reason.count("disk: rename") == reason.count("gpu: cuda") == 1, (
        "equal results of two nodes are printed once"
    )
    assert " 0 failed" in reason
