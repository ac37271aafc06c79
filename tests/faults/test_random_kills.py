"""Two ranks, ZeRO 1 and 3, killed at random instants and started again until they are done: nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.faults.conftest import Case
from tests.faults.supervisor import Tally, supervise

pytestmark = pytest.mark.faults

A_RUN = 12  # kills of one run at most; then it may end


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random(case: Callable[..., Case], kills: int) -> None:
    chance, tally = random.Random(f"{kills} kills"), Tally()
    a_run = min(A_RUN, kills // 2)
    while tally.kills.total() < kills:
        stage = (1, 3)[tally.runs % 2]
        left = kills - tally.kills.total()
        supervise(case(stage, f"run-{tally.runs}"), chance, min(a_run, left), tally)
        print(tally.report(), flush=True)
    assert tally.restarts >= kills
    assert tally.taken > tally.steps  # it did cost something
