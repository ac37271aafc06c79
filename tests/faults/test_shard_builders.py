"""Builders of one shard set, killed at every instant and while others race: what is visible is whole, and always the same."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.faults import lives
from trainer.shards.read import Shards
from trainer.storage import atomic_dir

pytestmark = pytest.mark.faults

RECIPE = ["--data", "stories", "--tokenizer_name", "stories", "--num_problems", "60", "--num_processes", "1"]


def _build(output: Path, logs: Path, instant: str = "") -> lives.Life:
    """One builder of `output`; it dies at the instant, if one is named."""
    wanted = {}
    if instant:
        marker = logs / f"died-{time.monotonic_ns()}"
        wanted = {"kill": {"instant": instant, "rank": 0, "step": 0, "marker": str(marker)}}
    arguments = [*RECIPE, "--output_dir", str(output)]
    return lives.start(arguments, 1, logs, json.dumps(wanted), command="tools/prepare_shards.py")


INSTANTS = ("half tokenised", "half a manifest", "before the rename", "after the rename")


def test_killed_builders_and_racing_ones(stories: Shards, tmp_path: Path) -> None:
    """No lock is involved: the first rename wins, whoever dies meanwhile."""
    output, logs = tmp_path / "shards" / "stories", tmp_path / "logs"
    for number, instant in enumerate(INSTANTS, start=1):
        with _build(output, logs, f"building: {instant}") as life:
            (died,) = life.wait()
        assert died.status == -signal.SIGKILL, died.output
        assert output.exists() == (instant == "after the rename")
        half = list(output.parent.glob(".*.tmp"))
        assert (
            len(half) == number - output.exists()
        )  # nobody else's is touched: its builder might live elsewhere
    assert Shards.open(output, verify=True).fingerprint == stories.fingerprint

    again = tmp_path / "again" / "stories"
    racers = [_build(again, logs) for _ in range(2)]
    racers += [_build(again, logs, f"building: {instant}") for instant in INSTANTS[:3]]
    outcomes = []
    for life in racers:
        with life:
            outcomes += life.wait()
    assert [outcome.status for outcome in outcomes[:2]] == [0, 0], outcomes[0].output + outcomes[1].output
    assert {outcome.status for outcome in outcomes[2:]} <= {
        -signal.SIGKILL,
        0,
    }  # 0: it found the others' finished
    atomic_dir.verify_digests(again)
    assert Shards.open(again).fingerprint == stories.fingerprint
