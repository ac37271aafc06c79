"""slurm/dev_cluster.sh and slurm/ranks.sh on a real Slurm, with shell commands in the place of ranks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm_cluster import DEV_CLUSTER, MISSING_PACKAGES, REPOSITORY, Cluster, make

RANKS = REPOSITORY / "slurm" / "ranks.sh"
# A rank that saves when it is told, or goes on for a minute.
SAVES = 'trap "echo saved; exit 75" TERM USR1; echo started; for i in $(seq 600); do sleep 0.1; done'


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """A cluster of one test."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    cluster = Cluster(folder)
    yield cluster
    cluster.run(DEV_CLUSTER, "down")
    shutil.rmtree(folder, ignore_errors=True)


def batch(folder: Path, *lines: str) -> Path:
    """A batch script in `folder` that prints into out.txt, and says where each start begins."""
    options = ["open-mode=append", "requeue", f"output={folder}/out.txt", "ntasks-per-node=1", "nodes=2"]
    script = folder / "job.sbatch"
    head = ["#!/usr/bin/env bash", *(f"#SBATCH --{option}" for option in options)]
    script.write_text("\n".join([*head, "echo restart ${SLURM_RESTART_COUNT:-0}", *lines]) + "\n")
    return script


def printed(folder: Path) -> str:
    file = folder / "out.txt"
    return file.read_text() if file.exists() else ""


def preempt(cluster: Cluster) -> None:
    """A job of the partition "high" that needs both nodes, and is over at once."""
    cluster.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")


def test_up_status_down_and_nothing_is_left(own_cluster: Cluster) -> None:
    make(own_cluster.folder)
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
    cluster.wait(lambda: "the job is requeued" in printed(tmp_path), "the job asks")
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
    cluster.wait(lambda: "the job is requeued" in printed(tmp_path), "task 1 asks")
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


# What srun ends as soon as another rank has ended badly: as a tool does while it imports, while it trains, or not at all.
OTHERS = {"saves": "trap 'exit 75' TERM", "fails too": "trap 'exit 1' TERM", "is ended": ":"}


def one_ends_badly(how: str, other: str) -> str:
    """A rank that ends by itself after a moment, the other one when it is told."""
    other = f"{OTHERS[other]}; for i in $(seq 600); do sleep 0.1; done"
    return f"[[ ! ${{SLURM_RESTART_COUNT:-}} ]] || exit 0; if [[ $SLURM_PROCID = 1 ]]; then sleep 1; {how}; fi; {other}"


@pytest.mark.parametrize("other", OTHERS)
def test_a_failed_job_is_not_started_again(cluster: Cluster, tmp_path: Path, other: str) -> None:
    """Although the other rank, told to end by srun, may say that it wants to go on."""
    (tmp_path / "rank").write_text(one_ends_badly("exit 2", other))
    job = cluster.sbatch(batch(tmp_path, f"exec {RANKS} bash {tmp_path}/rank"))
    cluster.wait_for_state(job, "FAILED")
    assert cluster.fact(job, "Restarts") == "0"
    assert cluster.fact(job, "ExitCode") == "2:0"


@pytest.mark.parametrize(
    ("how", "other", "said"),
    [("kill -KILL $$", "saves", "a rank was killed"), ("exit 76", "fails too", "a rank is gone")],
)
def test_a_job_that_lost_a_rank_goes_on(
    cluster: Cluster, tmp_path: Path, how: str, other: str, said: str
) -> None:
    """Killed, or gone as far as another rank can tell."""
    (tmp_path / "rank").write_text(one_ends_badly(how, other))
    job = cluster.sbatch(batch(tmp_path, f"exec {RANKS} bash {tmp_path}/rank"))
    cluster.wait(lambda: f"{said}, the job is requeued" in printed(tmp_path), "the job asks")
    cluster.start_now(job)
    cluster.wait_for_state(job, "COMPLETED")
    assert cluster.fact(job, "Restarts") == "1"


def test_a_rank_that_is_killed_again_and_again_ends_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """A conversion for which there is no memory would be started for ever."""
    many = "export SLURM_RESTART_COUNT=10"  # as Slurm would say
    job = cluster.sbatch(batch(tmp_path, many, f"exec {RANKS} bash -c 'kill -KILL $$'"))
    cluster.wait_for_state(job, "FAILED")
    assert cluster.fact(job, "Restarts") == "0" and cluster.fact(job, "ExitCode") == "137:0"


def test_slurms_own_warning_before_the_time_limit_is_heard(cluster: Cluster, tmp_path: Path) -> None:
    """Of a limit of a minute --signal takes nearly all, so that Slurm, which looks now and then, gives it early."""
    script = batch(tmp_path, f"exec {RANKS} bash -c '{SAVES}'")
    job = cluster.sbatch("--time=00:01:00", "--signal=USR1@58", script)
    cluster.wait(lambda: "ranks.sh: told to stop" in printed(tmp_path), "the job is told and saves")
    assert "the job is requeued" in printed(tmp_path), printed(tmp_path)
    cluster.run_well("scancel", job)
    assert printed(tmp_path).count("saved") == 2


LEFT = "import os; from trainer.runtime.distributed import seconds_left_of_job as left; print('left', left(os.environ))"


def test_a_job_knows_its_time_limit_and_its_nodes_by_address(cluster: Cluster, tmp_path: Path) -> None:
    """Node names of this cluster are no host names: rank 0 is found all the same."""
    python = cluster.environment["PYTHON"]
    ask = "import os; from trainer.runtime import distributed as d; print('at', d._master_address(os.environ, d.environment_from_launcher(os.environ))[0])"
    output = cluster.run_well("srun", "--nodes=2", "--time=00:30:00", python, "-c", f"{LEFT}\n{ask}")
    left = [float(line.split()[1]) for line in output.splitlines() if line.startswith("left")]
    assert len(left) == 2 and all(1000 < seconds <= 1800 for seconds in left), output
    assert output.count("at 127.0.0.1") == 2


def test_contradictory_ranks_are_refused_by_every_rank(cluster: Cluster, tmp_path: Path) -> None:
    """RANK and WORLD_SIZE left over in the shell reach every task."""
    python = cluster.environment["PYTHON"]
    flags = ["--train_shards=none", "--config_name=stories-0.2m", f"--output_dir={tmp_path}/run"]
    leftover = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    status, output = cluster.run("srun", "--nodes=2", python, "tools/train.py", *flags, **leftover)
    assert status == 2
    assert "RANK=0 but SLURM_PROCID=1: RANK was left over in the environment" in output
    assert not os.path.exists(tmp_path / "run" / "metrics.jsonl")


TICKETS = """
from trainer.runtime import distributed
distributed.initialize()
from trainer.evaluation.work_queue import CELLS
from trainer.runtime.shared_counter import shared_counter
with shared_counter(CELLS) as counter:
    drawn = [counter.add("next_batch", 1) for _ in range(5)]
everybodys = distributed.gather_objects(drawn)
if distributed.is_main_process():
    print(type(counter).__name__, sorted(sum(everybodys, [])))
distributed.shutdown()
"""


@pytest.mark.parametrize("mpi", ["none", "pmi2"])
def test_tickets_are_drawn_over_tcp_whatever_mpi_a_site_has(cluster: Cluster, mpi: str) -> None:
    srun = ["srun", f"--mpi={mpi}", "--nodes=2"]
    output = cluster.run_well(*srun, cluster.environment["PYTHON"], "-c", TICKETS)
    assert f"StoreCounter {list(range(10))}" in output, output


def test_the_doctor_looks_at_every_node_of_a_job(cluster: Cluster, tmp_path: Path) -> None:
    """As a batch job, without what takes long (tests/doctor has it); each node is a machine of its own."""
    layout = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/doctor.out"]
    flags = [f"--output_dir={tmp_path}/runs", "--min_free_gb=0", "--skip", "parity", "mpi"]
    job = cluster.sbatch(*layout, "slurm/doctor.sbatch", *flags)
    cluster.wait_for_state(job, "COMPLETED")
    said = (tmp_path / "doctor.out").read_text()
    assert f"slurm: environment: job {job}, 2 rank(s) by slurm" in said, said
    assert "between 2 ranks on 1 machine" in said and "2 ranks (" in said, "the nodes reach each other"
    assert said.count("disk: rename") == said.count("gpu: cuda") == 1, "what two nodes agree on is told once"
    assert " 0 failed" in said
