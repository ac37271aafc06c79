"""A hung rank is named and all ranks end; a full disk keeps the previous checkpoint; ranks must have the same code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed import REPOSITORY, Ranks, run
from tests.training.conftest import settings
from trainer.models import load
from trainer.runtime import directory_lock
from trainer.runtime.exit_codes import EXIT_PEER_LOST, EXIT_REQUEUE
from trainer.shards.read import Shards
from trainer.storage.run_directory import RunDirectory


def _file(folder: Path, values: dict[str, Any]) -> str:
    file = folder / "train.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(file)


def _last_step(run: RunDirectory, rank: int) -> int:
    try:
        return int(json.loads((run.heartbeats / f"rank-{rank:05d}.json").read_text())["step"])
    except (FileNotFoundError, ValueError):
        return -1


def _wait_for_step(run: RunDirectory, step: int, ranks: Ranks, rank: int) -> None:
    deadline = time.monotonic() + 180
    while _last_step(run, rank) < step:
        assert time.monotonic() < deadline and all(p.poll() is None for p in ranks.processes), "no step"
        time.sleep(0.05)


@pytest.mark.parametrize("hung", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_hung_rank_is_named_and_all_ranks_end(tmp_path: Path, stories: Shards, hung: int) -> None:
    values = settings(stories, tmp_path / "run", max_steps=100000, heartbeat_timeout_seconds=5)
    run = RunDirectory(tmp_path / "run")
    with Ranks(["tools/train.py", "--config", _file(tmp_path, values)], 2) as ranks:
        _wait_for_step(run, 2, ranks, hung)
        os.kill(ranks.processes[hung].pid, signal.SIGSTOP)
        outcomes = ranks.wait(timeout=180)
        pid = ranks.processes[hung].pid
    assert outcomes[hung].status == -signal.SIGKILL
    assert outcomes[1 - hung].status == EXIT_REQUEUE
    message = re.search(
        rf"rank {hung} \(host \S+, pid {pid}\) has not moved since step (\d+), (\d+) s ago",
        outcomes[1 - hung].output,
    )
    assert message, outcomes[1 - hung].output
    assert int(message[1]) >= 2 and int(message[2]) >= 5
    directory_lock.acquire(run.lock).release()  # the lock is free


@pytest.mark.slow
def test_without_the_watchdog_the_time_limit_of_a_collective_ends_the_others(
    tmp_path: Path, stories: Shards
) -> None:
    """Also in the groups that DeepSpeed creates, whose default is 30 minutes."""
    values = settings(
        stories, tmp_path / "run", max_steps=100000, heartbeat_timeout_seconds=0, timeout_seconds=15
    )
    with Ranks(["tools/train.py", "--config", _file(tmp_path, values)], 2) as ranks:
        _wait_for_step(RunDirectory(tmp_path / "run"), 2, ranks, 1)
        os.kill(ranks.processes[1].pid, signal.SIGSTOP)
        output, _ = ranks.processes[0].communicate(timeout=300)
    assert ranks.processes[0].returncode == EXIT_PEER_LOST
    assert "Timed out waiting 15000ms" in output


FULL = """
import json, subprocess, sys
from pathlib import Path
from tests.distributed import run
disk, config, room = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)]
subprocess.run(mount, check=True)
first = run(["tools/train.py", "--config", config], 2, timeout=300)
left = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
subprocess.run(["mount", "-o", f"remount,size={3 * room}", str(disk)], check=True)
again = run(["tools/train.py", "--config", config], 2, timeout=300)
print(json.dumps({
    "status": [one.status for one in first], "output": first[0].output, "left": left,
    "status_again": [one.status for one in again], "output_again": again[0].output,
}))
"""


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, stories: Shards) -> None:
    """On a small file system in a mount namespace of this test."""
    namespace = ["unshare", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*namespace, "true"], capture_output=True).returncode
    ):
        pytest.skip("needs mount namespaces (unshare --map-root-user --mount)")
    disk = tmp_path / "disk"
    disk.mkdir()
    sizes = "hidden_size=160,intermediate_size=400,num_hidden_layers=4,num_attention_heads=4,num_key_value_heads=2"
    values = settings(
        stories, disk / "run", max_steps=2, save_steps=1, deepspeed="ds_configs/zero2.json", config_overrides=sizes
    )  # fmt: skip
    config = load.load_config("stories-0.2m", sizes, stories.facts["vocabulary_size"])
    checkpoint_bytes = 16 * load.num_parameters(config)  # weights, masters and two moments
    assert checkpoint_bytes > 8e6
    command = [sys.executable, "-c", FULL, str(disk), _file(tmp_path, values), str(8 * checkpoint_bytes // 5)]
    ended = subprocess.run([*namespace, *command], cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["status"] == [2, 2], found["output"]
    message = re.search(
        r"(\d+) more bytes are needed and (\d+) are free there: (\d+) bytes are missing", found["output"]
    )
    assert message and int(message[3]) == int(message[1]) - int(message[2]) > 0, found["output"]
    assert int(message[3]) < checkpoint_bytes
    assert found["left"] == ["step-000001"]  # and no staging directory
    assert found["status_again"] == [0, 0], found["output_again"]
    assert "resumed from" in found["output_again"]


OTHER_CODE = "import os, runpy, sys; sys.path.insert(0, sys.argv[1 + int(os.environ['RANK'])]); " \
    "sys.argv = ['train_many', sys.argv[3]]; runpy.run_module('tests.training.train_many', run_name='__main__')"  # fmt: skip


def test_ranks_of_different_code_are_refused(tmp_path: Path, stories: Shards) -> None:
    for folder in ("trainer", "tests"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "trainer" / "training" / "loss.py", "a", encoding="utf-8") as file:
        file.write("\n# another version\n")
    runs = tmp_path / "runs.json"
    runs.write_text(json.dumps([settings(stories, tmp_path / "run")]), encoding="utf-8")
    outcomes = run(["-P", "-c", OTHER_CODE, str(REPOSITORY), str(tmp_path), str(runs)], 2)
    assert [outcome.status for outcome in outcomes] == [2, 2], outcomes[0].output
    assert "installation: rank 1 differs from rank 0 in trainer's code" in outcomes[0].output
