"""The wall clock jumps by days, differently on every rank: no result may depend on it."""

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
def test_a_run_under_a_jumping_clock(make_case: Callable[..., Case], stage: int) -> None:
    """With lock, watchdog and a time limit of an hour, which by the wall clock is over immediately."""
    case = make_case(stage, time_limit_seconds=3600)
    with case.start(clock=HOURS, kill={"instant": "after the update", "rank": 1, "step": 17}) as ranks:
        ranks.wait()
    assert case.marker.exists()
    # By its times the newest checkpoint is old, and the previous one is from the future.
    oldest, newest = case.run.checkpoint_steps()
    for step, hours in ((newest, -9000), (oldest, 9000)):
        folder = case.run.checkpoint(step)
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (time.time() + hours * 3600,) * 2)
    assert case.reference is not None
    oracle.assert_same_so_far(case.run, case.reference)
    output = case.finish(clock=HOURS)
    assert f"resumed from {case.run.checkpoint(newest)}" in output
    case.assert_same()
