"""Two ranks, ZeRO 1 and 3, killed at random instants and started again until the run is finished: nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.faults.conftest import Case
from tests.faults.supervisor import Tally, supervise

pytestmark = pytest.mark.faults

MAX_KILLS_PER_RUN = 12


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random(make_case: Callable[..., Case], kills: int) -> None:
    chance, tally = random.Random(f"{kills} kills"), Tally()
    max_kills = min(MAX_KILLS_PER_RUN, kills // 2)
    while tally.kills.total() < kills:
        stage = (1, 3)[tally.runs % 2]
        left = kills - tally.kills.total()
        supervise(make_case(stage, f"run-{tally.runs}"), chance, min(max_kills, left), tally)
        print(tally.report(), flush=True)
    assert tally.restarts >= kills
    assert tally.steps_done > tally.steps  # kills happened after steps
