"""SIGKILL of one rank at every instant of the start, a step, a save and the end, all in one run."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.faults import oracle
from tests.faults.conftest import Case, printed

pytestmark = pytest.mark.faults

# (instant, rank, step) in the order of the run, which saves a checkpoint every third step.
DEATHS = [
    ("in the run's files", 0, 0),
    ("in the first weights", 0, 0),
    ("holding the lock", 1, 0),
    ("in save: one rank has written", 0, 3),
    ("after forward", 1, 5),
    ("half resumed", 1, 0),
    ("half an evaluation", 0, 5),
    ("in save: half a file", 1, 6),
    ("in the reduce", 0, 7),
    ("in save: before the digests", 1, 9),
    ("in backward", 0, 10),
    ("in save: before the manifest", 0, 12),
    ("in the pruning", 0, 12),
    ("in the update's collective", 1, 14),
    ("in save: half a manifest", 0, 15),
    ("half a line of metrics", 0, 17),
    ("in save: before the rename", 0, 18),
    ("in the pruning: half removed", 0, 18),
    ("before the update", 1, 20),
    ("in save: after the rename", 0, 21),
    ("before the pruning", 1, 24),
    ("after the update", 0, 25),
    ("in save: before the rename", 0, 26),
    ("at the end", 0, 26),
]
# In stage 0 rank 0 alone writes, and an update has no collective.
DEATHS_OF_REPLICAS = [
    (instant, 0 if instant == "in save: half a file" else rank, step)
    for instant, rank, step in DEATHS
    if instant != "in the update's collective"
]
SLOW = pytest.mark.slow


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=SLOW) for stage in (0, 2, 3))])
def test_killed_at_every_instant(make_case: Callable[..., Case], stage: int) -> None:
    case = make_case(stage)
    for instant, rank, step in DEATHS if stage else DEATHS_OF_REPLICAS:
        with case.start(kill={"instant": instant, "rank": rank, "step": step}) as ranks:
            outcomes = ranks.wait()
        message = f"{instant}, rank {rank}, step {step}:\n{printed(outcomes)}"
        assert case.marker.exists() and outcomes[rank].status == -signal.SIGKILL, message
        # The other rank ends by itself with an error, or regularly if the run is finished.
        assert outcomes[1 - rank].status > 0 or instant == "at the end", message
        oracle.assert_same_so_far(case.run, case.reference)
    with case.start() as ranks:
        outcomes = ranks.wait()
    assert "already finished" in outcomes[0].output
    assert [outcome.status for outcome in outcomes] == [0, 0]
    case.assert_same()
