"""Builders of one shard set, killed at every instant and racing: the visible set is complete and always the same."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.faults import forked_ranks
from trainer.shards.read import Shards
from trainer.storage import atomic_dir

pytestmark = pytest.mark.faults

RECIPE = ["--data", "stories", "--tokenizer_name", "stories", "--num_problems", "60", "--num_processes", "1"]


def _build(output: Path, logs: Path, instant: str = "") -> forked_ranks.ForkedRanks:
    """Start a builder of `output`, which is killed at `instant` if one is given."""
    faults = {}
    if instant:
        marker = logs / f"died-{time.monotonic_ns()}"
        faults = {"kill": {"instant": instant, "rank": 0, "step": 0, "marker": str(marker)}}
    arguments = [*RECIPE, "--output_dir", str(output)]
    return forked_ranks.start(arguments, 1, logs, json.dumps(faults), command="tools/prepare_shards.py")


INSTANTS = ("half tokenised", "half a manifest", "before the rename", "after the rename")


def test_killed_builders_and_racing_ones(stories: Shards, tmp_path: Path) -> None:
    """Without a lock: the first rename wins."""
    output, logs = tmp_path / "shards" / "stories", tmp_path / "logs"
    for number, instant in enumerate(INSTANTS, start=1):
        with _build(output, logs, f"building: {instant}") as ranks:
            (died,) = ranks.wait()
        assert died.status == -signal.SIGKILL, died.output
        assert output.exists() == (instant == "after the rename")
        staging = list(output.parent.glob(".*.tmp"))
        # Those of other builders stay: they may be running on another host.
        assert len(staging) == number - output.exists()
    assert Shards.open(output, verify=True).fingerprint == stories.fingerprint

    again = tmp_path / "again" / "stories"
    racers = [_build(again, logs) for _ in range(2)]
    racers += [_build(again, logs, f"building: {instant}") for instant in INSTANTS[:3]]
    outcomes = []
    for ranks in racers:
        with ranks:
            outcomes += ranks.wait()
    assert [outcome.status for outcome in outcomes[:2]] == [0, 0], outcomes[0].output + outcomes[1].output
    # 0: the set of another builder was already there
    assert {outcome.status for outcome in outcomes[2:]} <= {-signal.SIGKILL, 0}
    atomic_dir.verify_digests(again)
    assert Shards.open(again).fingerprint == stories.fingerprint
