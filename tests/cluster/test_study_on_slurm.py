"""tools/study.py submit, status, logs, resubmit and cancel, on a real Slurm, from shards to the report."""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import STUDY
from tests.slurm_cluster import REPOSITORY, Cluster

VENV = Path(sys.executable).parent.parent
CONFIG = {
    "PARTITION": "low",
    "GPUS_PER_NODE": "1",  # so that two ranks are two nodes
    "GPU_TYPE": "pretended",
    "TIME_LIMIT": "00:30:00",
    "EVALUATE_TIME_LIMIT": "00:30:00",
    "VENV": str(VENV),
}


@dataclass
class Command:
    """`python tools/study.py COMMAND tiny.yaml ...` in a separate folder."""

    folder: Path
    cluster: Cluster

    def write(self, values: dict[str, Any], **config: str) -> None:
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        lines = [f"{key}={value}" for key, value in {**CONFIG, **config}.items()]
        (self.folder / "cluster.env").write_text("\n".join(lines) + "\n")

    def __call__(self, command: str, *flags: str) -> tuple[int, str]:
        tool = REPOSITORY / "tools" / "study.py"
        return self.cluster.run(sys.executable, tool, command, "tiny.yaml", *flags, cwd=self.folder)

    def jobs(self) -> dict[str, str]:
        """Return stage label -> job id."""
        record = json.loads((self.folder / "runs/tiny/slurm/jobs.json").read_text())
        return {label: job["job"] for label, job in record["jobs"].items()}

    def in_queue(self) -> bool:
        return bool(self.cluster.run_well("squeue", "--noheader").strip())


@pytest.fixture(scope="module")
def command(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Submit a study and wait for its end: one run succeeds, the other fails (its learning rate is too large)."""
    folder = tmp_path_factory.mktemp("study")
    command = Command(folder, cluster)
    values = copy.deepcopy(STUDY)
    values["methods"] = ["cot"]
    values["models"]["bad"] = {"config_name": "stories-0.2m", "learning_rate": 1e20}
    command.write(values, SCRATCH=str(folder / "scratch"))
    status, output = command("submit", "--cluster", "cluster.env")
    assert status == 0, output
    assert "study tiny: 9 stages in 6 jobs, 0 done, 0 in the queue before" in output
    (folder / "submitted.txt").write_text(output)
    (folder / "early.txt").write_text(command("status")[1])
    cluster.wait(lambda: not command.in_queue(), "the study's jobs have ended", 600)
    return command


def test_the_report_is_made_although_a_run_failed(command: Command) -> None:
    results = command.folder / "runs/tiny/report/results.json"
    assert (command.folder / "runs/tiny/report/index.html").is_file(), command("logs", "tiny")[1]
    assert "stories.cot.0.2m.s0" in results.read_text()
    evaluation = command.folder / "runs/tiny/stories.cot.0.2m.s0/evaluation/stories-test-cot/results.json"
    assert json.loads(evaluation.read_text())["world_size"] == 2


def test_two_nodes_trained(command: Command) -> None:
    log = (command.folder / "runs/tiny/stories.cot.0.2m.s0/logs/train.log").read_text()
    assert re.search(r"^=== 20\S+ job \d+_0 on n\[1-2\], restart 0$", log, re.MULTILINE), log
    assert "2 rank(s)" in log


def test_temporary_files_are_gone(command: Command) -> None:
    assert list((command.folder / "scratch").iterdir()) == []


def test_status_before_and_after_the_jobs(command: Command) -> None:
    early = (command.folder / "early.txt").read_text()
    rows = [line.split() for line in early.splitlines()]
    assert any(row[:3] == ["train", "stories.cot.0.2m.s0", "pending"] for row in rows), early
    status, output = command("status")
    assert status == 0
    assert "jobs of study tiny: " in output and "3 failed" in output
    failed = {line.split()[0]: line for line in output.splitlines() if " failed " in line and ".bad." in line}
    assert list(failed) == ["train", "convert", "evaluate"]
    assert "error:" in failed["train"] and "not finite" in failed["train"], output
    assert "a job it depends on has failed" in failed["convert"], output
    assert "tools/study.py resubmit tiny.yaml --failed" in output


def test_logs_of_a_run(command: Command) -> None:
    status, output = command("logs", "stories.cot.bad.s0")
    assert status == 0
    assert "--- train stories.cot.bad.s0: runs/tiny/stories.cot.bad.s0/logs/train.log" in output
    assert "error:" in output
    status, output = command("logs", "stories.cot.bd.s0")
    assert status == 2
    assert "no run 'stories.cot.bd.s0' (did you mean 'stories.cot.bad.s0'?)" in output


def test_only_failed_stages_are_resubmitted_and_can_be_cancelled(command: Command) -> None:
    before = command.jobs()
    # Drain the nodes: a job that starts would fail again before it can be cancelled.
    run = command.cluster.run_well
    run("scontrol", "update", "NodeName=n1,n2", "State=DRAIN", "Reason=test")
    try:
        status, output = command("resubmit", "--failed")
        assert status == 0, output
        assert "train stories.cot.bad.s0: job " in output and "prepare" not in output
        assert "stories.cot.0.2m.s0" not in output
        again = command.jobs()
        changed = [label for label in again if again[label] != before[label]]
        assert changed == [label for label in before if ".bad." in label or label == "report tiny"]
        status, output = command("submit", "--cluster", "cluster.env")
        assert "3 in the queue before" in output, (
            "only the report is new; it depends on the jobs in the queue"
        )
        status, output = command("cancel")
        assert "study tiny: 4 jobs cancelled" in output
        command.cluster.wait(lambda: not command.in_queue(), "they are cancelled")
    finally:
        command("cancel")
        run("scontrol", "update", "NodeName=n1,n2", "State=RESUME")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"PARTITION": "lo"}, "PARTITION=lo: there is no such partition (did you mean 'low'?)"),
        ({"CPU_PARTITION": "cpu"}, "CPU_PARTITION=cpu: there is no such partition; this cluster has"),
        ({"GPU_TYPE": "h100"}, "GPU_TYPE=h100: the partition low has no such type; it has pretended"),
        ({"GPUS_PER_NODE": "8"}, "GPUS_PER_NODE=8: a node of low has 4 at most"),
        (
            {"TIME_LIMIT": "30-00:00:00"},
            "TIME_LIMIT=30-00:00:00: partition low allows at most 1-00:00:00",
        ),
        ({"CONSTRAINT": "nvlink"}, "Slurm rejected the train jobs, so all jobs were cancelled"),
        # This cluster does not manage memory; accounts have a separate test.
        (
            {"RESERVATION": "tuesday"},
            "Requested reservation is invalid; is it RESERVATION=tuesday? (requested:",
        ),
        ({"ACOUNT": "me"}, "unknown key 'ACOUNT' (did you mean 'ACCOUNT'?)"),
    ],
)
def test_what_the_cluster_would_refuse_is_told_and_nothing_is_submitted(
    cluster: Cluster, tmp_path: Path, config: dict[str, str], message: str
) -> None:
    command = Command(tmp_path, cluster)
    command.write(STUDY, **config)
    status, output = command("submit", "--cluster", "cluster.env")
    assert status == 2
    assert "cluster.env" in output and message in output, output
    cluster.wait(lambda: not command.in_queue(), "a refused submission leaves the queue empty")
    assert not list(tmp_path.glob("shards/*")), "no stage has started"
    assert not (tmp_path / "runs").exists() or not list(tmp_path.glob("runs/tiny/slurm/*"))


def test_an_account_that_may_not_use_the_partition_is_named(cluster: Cluster, tmp_path: Path) -> None:
    cluster.run_well("scontrol", "create", "PartitionName=members", "Nodes=n1,n2")
    cluster.run_well("scontrol", "update", "PartitionName=members", "AllowAccounts=members")
    command = Command(tmp_path, cluster)
    try:
        command.write(STUDY, PARTITION="members", ACCOUNT="me")
        status, output = command("submit", "--cluster", "cluster.env")
        assert status == 2 and "Invalid account" in output and "is it ACCOUNT=me?" in output, output
        cluster.wait(lambda: not command.in_queue(), "all jobs were cancelled")
    finally:
        cluster.run_well("scontrol", "delete", "PartitionName=members")


def test_a_dry_run_shows_every_script_and_submits_nothing(cluster: Cluster, tmp_path: Path) -> None:
    command = Command(tmp_path, cluster)
    command.write(STUDY)
    status, output = command("submit", "--cluster", "cluster.env", "--dry_run")
    assert status == 0, output
    assert output.count("#!/usr/bin/env bash") == 6
    assert "9 stages in 6 jobs; nothing was submitted" in output
    assert not (tmp_path / "runs").exists() and not command.in_queue()


def test_missing_slurm_commands_are_named(cluster: Cluster, tmp_path: Path) -> None:
    command = Command(tmp_path, cluster)
    command.write(STUDY)
    tool = REPOSITORY / "tools" / "study.py"
    arguments = [sys.executable, tool, "submit", "tiny.yaml", "--cluster", "cluster.env"]
    status, output = cluster.run(*arguments, cwd=tmp_path, PATH=str(tmp_path))
    assert status == 2
    assert "no sbatch, squeue, scontrol, scancel, sinfo on the PATH" in output
