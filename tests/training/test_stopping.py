"""On a stop signal a training saves and exits with a status for a requeue; the resumed run equals an undisturbed one."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed import Ranks, run, run_well
from tests.training.conftest import settings, trajectory
from trainer.runtime.exit_codes import EXIT_REQUEUE
from trainer.shards.read import Shards
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory

STEPS = 30


def configured(folder: Path, stories: Shards, name: str, **changes: Any) -> Path:
    values = settings(
        stories, folder / name, max_steps=STEPS, eval_shards=str(stories.path), eval_steps=2, **changes
    )
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def lines(run: RunDirectory, key: str) -> dict[int, Any]:
    """Return step -> value of the lines with this key."""
    records = map(json.loads, run.metrics.read_text().splitlines()) if run.metrics.exists() else iter(())
    return {line["step"]: line[key] for line in records if key in line}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, stories: Shards) -> Path:
    """Runs on two ranks: `whole` finished; `signalled` got SIGUSR1 on one rank in the middle."""
    folder = tmp_path_factory.mktemp("stopped")
    run_well(["tools/train.py", "--config", str(configured(folder, stories, "whole"))], 2, timeout=300)
    file, directory = configured(folder, stories, "signalled"), RunDirectory(folder / "signalled")
    with Ranks(["tools/train.py", "--config", str(file)], 2) as ranks:
        deadline = time.monotonic() + 200
        while not lines(directory, "loss") and time.monotonic() < deadline:
            time.sleep(0.01)
        ranks.processes[1].send_signal(signal.SIGUSR1)
        outcomes = ranks.wait(200)
    assert [outcome.status for outcome in outcomes] == [EXIT_REQUEUE, EXIT_REQUEUE], outcomes[0].output
    assert "stopped as asked (another rank was asked to stop)" in outcomes[0].output
    return folder


def test_a_stopped_run_saves_its_last_step(stopped: Path) -> None:
    run = RunDirectory(stopped / "signalled")
    last = max(lines(run, "loss"))
    assert last < STEPS, "it was stopped in the middle"
    assert run.checkpoint_steps() == [last]
    facts = atomic_dir.read_manifest(run.checkpoint(last))["facts"]
    assert (facts["step"], facts["finished"]) == (last, False)


def test_a_stopped_run_resumes_with_all_evaluations(stopped: Path) -> None:
    signalled, whole = RunDirectory(stopped / "signalled"), RunDirectory(stopped / "whole")
    run_well(["tools/train.py", "--config", str(stopped / "signalled.yaml")], 2, timeout=300)
    assert [s["loss"] for s in trajectory(signalled.path)] == [s["loss"] for s in trajectory(whole.path)]
    assert lines(signalled, "evaluation") == lines(whole, "evaluation")
    assert sorted(lines(signalled, "evaluation")) == list(range(2, STEPS + 1, 2))


def test_a_limit_without_time_for_a_checkpoint_is_refused(stopped: Path, stories: Shards) -> None:
    """Starting takes longer than this limit."""
    file = configured(stopped, stories, "short", time_limit_seconds=1)
    outcomes = run(["tools/train.py", "--config", str(file)], 2)
    assert [outcome.status for outcome in outcomes] == [2, 2]
    for outcome in outcomes:
        assert "the time limit leaves" in outcome.output and "time_limit_seconds" in outcome.output
    assert not RunDirectory(stopped / "short").metrics.exists()


def test_restarts_without_a_new_checkpoint_end(stopped: Path, stories: Shards) -> None:
    """As if Slurm requeued a job that is always killed before its first step."""
    file = configured(stopped, stories, "looping", max_restarts=1)
    directory = RunDirectory(stopped / "looping")
    atomic_dir.write_text(
        directory.restarts,
        json.dumps({"restarts": 1, "without_progress": 1, "progress": 0, "job": "1", "time": ""}),
    )
    outcomes = run(["tools/train.py", "--config", str(file)], SLURM_RESTART_COUNT="2")
    assert outcomes[0].status == 2
    assert "restarted 2 times without getting further than 0" in outcomes[0].output
