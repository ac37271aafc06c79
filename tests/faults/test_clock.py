"""The wall clock jumps, by days, back and forward, another way on every rank: nothing may depend on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from tests.faults import oracle
from tests.faults.conftest import Case

pytestmark = pytest.mark.faults

HOURS = [30.0, -50.0, 0.0, 9000.0, -0.5]


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_under_a_jumping_clock(case: Callable[..., Case], stage: int) -> None:
    """Its lock, its watchdog and its time limit (an hour, which seems to be over at once) are in use all the time."""
    run = case(stage, time_limit_seconds=3600)
    with run.start(clock=HOURS, kill={"instant": "after the update", "rank": 1, "step": 17}) as life:
        life.wait()
    assert run.marker.exists()
    # The newest checkpoint looks old, the one before it as if it were from the future.
    oldest, newest = run.run.checkpoint_steps()
    for step, hours in ((newest, -9000), (oldest, 9000)):
        folder = run.run.checkpoint(step)
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (time.time() + hours * 3600,) * 2)
    assert run.reference is not None
    oracle.so_far(run.run, run.reference)
    said = run.finish(clock=HOURS)
    assert f"resumed from {run.run.checkpoint(newest)}" in said
    run.same()
