"""One training on two Slurm nodes that is cancelled, loses a node, and whose slurmctld dies: as if nothing had happened.

Preemption, the job's own time limit and a node lost where another is free: tests/cluster/test_training_on_slurm.py.
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
class Story:
    """`logs`: what each job printed; `states`: how Slurm says it ended; `restarts`: of the last job."""

    undisturbed: RunDirectory
    disturbed: RunDirectory
    logs: list[Path]
    states: list[str]
    restarts: str
    steps_when_cancelled: int


@pytest.fixture(scope="module")
def story(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story")
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
    return Story(
        undisturbed, disturbed, [folder / "disturbed.out", log], states, restarts, steps_when_cancelled
    )


def test_losses_and_weights_are_those_of_the_undisturbed_run(story: Story) -> None:
    assert len(losses(story.undisturbed)) == STEPS
    assert oracle.trajectory(story.disturbed) == oracle.trajectory(story.undisturbed)
    digests = [oracle.state_digest(run.checkpoint(STEPS)) for run in (story.undisturbed, story.disturbed)]
    assert digests[0] == digests[1]


def test_only_the_lost_node_cost_steps(story: Story) -> None:
    """Those since the last checkpoint; the cancelled job had saved, and of slurmctld the ranks know nothing."""
    assert story.states == ["CANCELLED", "COMPLETED"] and story.restarts == "1"
    done = Counter(
        json.loads(line)["step"]
        for line in story.disturbed.metrics.read_text().splitlines()
        if "loss" in line
    )
    repeated = [step for step, times in done.items() if times > 1]
    assert len(repeated) <= SAVE_STEPS and all(done[step] == 2 for step in repeated)
    assert all(step > story.steps_when_cancelled for step in repeated)
    said = story.logs[0].read_text()
    assert f"stopped as asked (SIGTERM) at step {story.steps_when_cancelled}/" in said
    assert "is requeued" not in said
    assert (
        f"resumed from {story.disturbed.checkpoint(story.steps_when_cancelled)}" in story.logs[1].read_text()
    )


def test_nothing_is_left_behind(cluster: Cluster, story: Story) -> None:
    assert cluster.ranks("train") == []
    assert not story.disturbed.lock.exists() and not story.disturbed.heartbeats.exists()
    assert [path.name for path in story.disturbed.checkpoints.iterdir() if not path.name.startswith(".")] == [
        f"step-{step:06d}" for step in (STEPS - SAVE_STEPS, STEPS)
    ]
