"""Training on two nodes: a run that is preempted, requeued and resumed equals an undisturbed one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.test_dev_cluster import preempt
from tests.slurm_cluster import Cluster
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory

STEPS = 160  # enough that the job still runs when Slurm preempts it, a few seconds after the request
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=00:30:00")


@dataclass(frozen=True)
class Trained:
    """Two runs with the same settings; `job` is that of the preempted one."""

    folder: Path
    job: str
    undisturbed: RunDirectory
    preempted: RunDirectory


def losses(run: RunDirectory) -> list[float]:
    """Return the losses by step; the last line of a repeated step counts."""
    lines = run.metrics.read_text().splitlines() if run.metrics.exists() else []
    steps = {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}
    return [steps[step] for step in sorted(steps)]


def submit_training(cluster: Cluster, folder: Path, run: RunDirectory, **changes: Any) -> str:
    values = {
        "train_shards": str(folder / "shards"),
        "output_dir": str(run.path),
        "config_name": "stories-0.2m",
        "pack_length": 512,
        "learning_rate": 3e-3,
        "max_steps": STEPS,
        "save_steps": 1000,
        "seed": 1,
        **changes,
    }
    file = folder / f"{run.name}.yaml"
    file.write_text(yaml.safe_dump(values))
    output = f"--output={folder}/{run.name}.out"
    return cluster.sbatch(*TWO_NODES, output, "slurm/train.sbatch", "--config", file)


@pytest.fixture(scope="module")
def trained(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("training")
    undisturbed, preempted = RunDirectory(folder / "undisturbed"), RunDirectory(folder / "preempted")
    prepare = ["--tokenizer_name=stories", "--num_problems=60", "--num_processes=1"]
    output = f"--output={folder}/prepare.out"
    shards = cluster.sbatch(
        output, "--cpus-per-task=1", "slurm/prepare.sbatch", *prepare, f"--output_dir={folder}/shards"
    )
    cluster.wait_for_state(shards, "COMPLETED")
    job = submit_training(cluster, folder, preempted)
    cluster.wait(lambda: len(losses(preempted)) >= 3 or (folder / "failed").exists(), "three steps")
    preempt(cluster)
    cluster.wait(lambda: "is requeued" in (folder / "preempted.out").read_text(), "the job is requeued")
    assert len(losses(preempted)) < STEPS, "it was preempted in the middle"
    cluster.start_now(job)
    # Both jobs run on the same nodes at the same time, and their ports must differ.
    other = submit_training(cluster, folder, undisturbed)
    for number in (job, other):
        cluster.wait_for_state(number, "COMPLETED")
    return Trained(folder, job, undisturbed, preempted)


def test_losses_are_those_of_the_undisturbed_run(trained: Trained) -> None:
    assert len(losses(trained.undisturbed)) == STEPS
    assert losses(trained.preempted) == losses(trained.undisturbed)


def test_it_was_requeued_and_no_step_was_done_twice(cluster: Cluster, trained: Trained) -> None:
    assert cluster.fact(trained.job, "Restarts") == "1"
    lines = trained.preempted.metrics.read_text().splitlines()
    assert len(lines) == STEPS, "the checkpoint is of the step at which it was stopped"
    counted = json.loads(trained.preempted.restarts.read_text())
    assert (counted["restarts"], counted["job"]) == (1, trained.job)
    log = (trained.folder / "preempted.out").read_text()
    assert "stopped as asked (SIGTERM)" in log and "resumed from" in log


def test_final_weights_are_those_of_the_undisturbed_run(cluster: Cluster, trained: Trained) -> None:
    digests = []
    for run in (trained.undisturbed, trained.preempted):
        output = f"--output={trained.folder}/convert.out"
        job = cluster.sbatch(output, "--cpus-per-task=1", "slurm/convert.sbatch", run.path)
        cluster.wait_for_state(job, "COMPLETED")
        digests.append(atomic_dir.read_manifest(run.export)["files"]["model.safetensors"]["sha256"])
    assert digests[0] == digests[1]


def test_ranks_on_two_nodes_take_problems_from_one_queue(cluster: Cluster, trained: Trained) -> None:
    """With the batch script, and with srun and PMI: the predictions are equal."""
    if not trained.undisturbed.export.exists():
        pytest.skip("the conversion failed")
    flags = [f"--model_name_or_path={trained.undisturbed.export}", f"--shards={trained.folder}/shards"]
    flags += ["--max_problems=6", "--max_new_tokens=8"]
    output = f"--output={trained.folder}/evaluate.out"
    by_script = trained.folder / "by_script"
    job = cluster.sbatch(output, *TWO_NODES, "slurm/evaluate.sbatch", *flags, f"--output_dir={by_script}")
    cluster.wait_for_state(job, "COMPLETED")
    with_pmi = trained.folder / "with_pmi"
    command = ["srun", "--mpi=pmi2", *TWO_NODES, cluster.environment["PYTHON"], "tools/evaluate.py"]
    cluster.run_well(*command, *flags, f"--output_dir={with_pmi}")
    assert json.loads((by_script / "results.json").read_text())["world_size"] == 2
    assert (by_script / "predictions.jsonl").read_bytes() == (with_pmi / "predictions.jsonl").read_bytes()


@pytest.mark.slow
def test_a_run_saves_before_its_time_limit_and_goes_on(cluster: Cluster, trained: Trained) -> None:
    """Without a signal from Slurm: the run reads its time limit."""
    run = RunDirectory(trained.folder / "limited")
    file = trained.folder / "limited.yaml"
    submitted = trained.folder / "limited.out"
    job = submit_training(cluster, trained.folder, run, max_steps=1_000_000)
    cluster.run_well("scancel", job)
    options = [*TWO_NODES[:-1], "--time=00:03:00", "--signal=CONT@1", f"--output={submitted}"]
    job = cluster.sbatch(*options, "slurm/train.sbatch", "--config", file)
    cluster.wait(lambda: submitted.exists() and "is requeued" in submitted.read_text(), "it asks", 400)
    assert "stopped as asked (the time limit is near)" in submitted.read_text()
    assert run.checkpoint_steps() and atomic_dir.is_complete(run.checkpoint(run.checkpoint_steps()[-1]))
    cluster.run_well("scancel", job)


@pytest.mark.slow
def test_a_job_whose_node_is_lost_goes_on_at_another(cluster: Cluster, trained: Trained) -> None:
    run = RunDirectory(trained.folder / "lost")
    file = trained.folder / "lost.yaml"
    job = submit_training(cluster, trained.folder, run, save_steps=5, max_steps=400)
    cluster.run_well("scancel", job)
    options = [
        "--nodes=1",
        "--ntasks-per-node=2",
        "--cpus-per-task=1",
        "--gpus-per-node=0",
        "--time=00:30:00",
    ]
    job = cluster.sbatch(
        *options, f"--output={trained.folder}/lost.out", "slurm/train.sbatch", "--config", file
    )
    cluster.wait(lambda: len(losses(run)) >= 6, "a checkpoint")
    node = cluster.fact(job, "NodeList")
    cluster.lose_node(node)
    cluster.wait(lambda: cluster.fact(job, "Restarts") == "1", "Slurm requeues the job")
    cluster.start_now(job)
    cluster.wait_for_state(job, "COMPLETED")
    assert cluster.fact(job, "NodeList") == {"n1": "n2", "n2": "n1"}[node]
    assert len(losses(run)) == 400
    assert "resumed from" in (trained.folder / "lost.out").read_text()
    cluster.revive_node(node)
