"""A training on two Slurm nodes is cancelled, loses a node and its slurmctld: its results equal the undisturbed run's.

Preemption, a job's time limit and a lost node with a free one: tests/cluster/test_training_on_slurm.py.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.test_training_on_slurm import TWO_NODES, losses, submit_training
from tests.faults import oracle
from tests.slurm_cluster import Cluster
from trainer.storage.run_directory import RunDirectory

pytestmark = [pytest.mark.faults, pytest.mark.slow]
STEPS, SAVE_STEPS = 600, 10


@dataclass
class DisturbedTraining:
    """`logs`: output of each job; `states`: Slurm's final state of each; `restarts`: of the last job."""

    undisturbed: RunDirectory
    disturbed: RunDirectory
    logs: list[Path]
    states: list[str]
    restarts: str
    steps_when_cancelled: int


@pytest.fixture(scope="module")
def training(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> DisturbedTraining:
    folder = tmp_path_factory.mktemp("training")
    undisturbed, disturbed = RunDirectory(folder / "undisturbed"), RunDirectory(folder / "disturbed")
    prepare = ["--tokenizer_name=stories", "--num_problems=60", "--num_processes=1"]
    prepared = cluster.sbatch(
        f"--output={folder}/prepare.out", "slurm/prepare.sbatch", *prepare, f"--output_dir={folder}/shards"
    )
    cluster.wait_for_state(prepared, "COMPLETED")
    changes = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "save_total_limit": 2}

    first = submit_training(cluster, folder, disturbed, **changes)
    cluster.wait(lambda: len(losses(disturbed)) >= 3, "three steps")
    cluster.run_well("scancel", first)
    cluster.wait_for_state(first, "CANCELLED")
    cluster.wait(lambda: not cluster.ranks("train"), "its ranks have saved and ended")
    steps_when_cancelled = len(losses(disturbed))

    log = folder / "again.out"
    command = ["slurm/train.sbatch", "--config", folder / "disturbed.yaml"]
    second = cluster.sbatch(*TWO_NODES, f"--output={log}", *command)
    cluster.wait(lambda: len(losses(disturbed)) >= steps_when_cancelled + 2 * SAVE_STEPS, "it goes on")
    cluster.lose_node("n2")
    cluster.wait(lambda: cluster.fact(second, "Restarts") == "1", "Slurm notices")
    cluster.revive_node("n2")
    cluster.start_now(second)
    before = len(losses(disturbed))
    cluster.wait(lambda: len(losses(disturbed)) >= before + SAVE_STEPS, "it goes on")

    cluster.kill_controller()
    before = len(losses(disturbed))
    cluster.wait(lambda: len(losses(disturbed)) >= before + SAVE_STEPS, "steps without slurmctld")
    cluster.start_controller()
    other = submit_training(cluster, folder, undisturbed, **changes)
    for job in (second, other):
        cluster.wait_for_state(job, "COMPLETED")
    states = [cluster.fact(job, "JobState") for job in (first, second)]
    restarts = cluster.fact(second, "Restarts")
    return DisturbedTraining(
        undisturbed, disturbed, [folder / "disturbed.out", log], states, restarts, steps_when_cancelled
    )


def test_losses_and_weights_are_those_of_the_undisturbed_run(training: DisturbedTraining) -> None:
    assert len(losses(training.undisturbed)) == STEPS
    assert oracle.trajectory(training.disturbed) == oracle.trajectory(training.undisturbed)
    digests = [
        oracle.state_digest(run.checkpoint(STEPS)) for run in (training.undisturbed, training.disturbed)
    ]
    assert digests[0] == digests[1]


def test_only_the_lost_node_cost_steps(training: DisturbedTraining) -> None:
    """Steps since the last checkpoint are repeated; the cancelled job had saved, and slurmctld does not affect ranks."""
    assert training.states == ["CANCELLED", "COMPLETED"] and training.restarts == "1"
    done = Counter(
        json.loads(line)["step"]
        for line in training.disturbed.metrics.read_text().splitlines()
        if "loss" in line
    )
    repeated = [step for step, times in done.items() if times > 1]
    assert len(repeated) <= SAVE_STEPS and all(done[step] == 2 for step in repeated)
    assert all(step > training.steps_when_cancelled for step in repeated)
    output = training.logs[0].read_text()
    assert f"stopped as asked (SIGTERM) at step {training.steps_when_cancelled}/" in output
    assert "is requeued" not in output
    assert (
        f"resumed from {training.disturbed.checkpoint(training.steps_when_cancelled)}"
        in training.logs[1].read_text()
    )


def test_nothing_is_left_behind(cluster: Cluster, training: DisturbedTraining) -> None:
    assert cluster.ranks("train") == []
    assert not training.disturbed.lock.exists() and not training.disturbed.heartbeats.exists()
    assert [
        path.name for path in training.disturbed.checkpoints.iterdir() if not path.name.startswith(".")
    ] == [f"step-{step:06d}" for step in (STEPS - SAVE_STEPS, STEPS)]
