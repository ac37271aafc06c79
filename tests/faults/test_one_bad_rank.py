"""One rank of two is not like the other: it computes no number, or was told something else. Both end, and say who."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import oracle
from tests.faults.conftest import Case

pytestmark = pytest.mark.faults

NOT_A_NUMBER = {
    "loss": r"rank 1: step 8: the loss on rank 1 is nan; problems of this rank: stories",
    "gradient": r"step 8: the gradient is not finite \(the loss is \d\.\d+\); problems of this rank: stories",
}


@pytest.mark.parametrize("what", NOT_A_NUMBER)
@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_what_is_not_a_number_never_reaches_the_weights(
    case: Callable[..., Case], what: str, stage: int
) -> None:
    """On rank 1 alone, once: the run ends, and goes on from its last checkpoint as if it had not been."""
    run = case(stage)
    run.refused(NOT_A_NUMBER[what], poison={"what": what, "rank": 1, "step": 8})
    assert run.marker.exists()
    assert run.run.checkpoint_steps() == [3, 6]
    assert run.reference is not None
    oracle.so_far(run.run, run.reference)
    run.finish()
    run.same()


def test_ranks_that_were_told_different_things_are_refused(case: Callable[..., Case], tmp_path: Path) -> None:
    """Each of these would give other numbers, or leave a rank waiting for ever."""
    told = {
        "learning_rate": "1e-4",
        "eval_steps": "7",
        "max_steps": "5",
        "timeout_seconds": "99",
        "output_dir": str(tmp_path / "elsewhere"),
        "gradient_accumulation_steps": "2",
    }
    run = case(1)
    own = tuple(word for name, value in told.items() for word in (f"--{name}", value))
    run.refused(
        "settings: rank 1 differs from rank 0 in " + ", ".join(sorted(told, key=list(run_order()).index)),
        last_ranks_own=own,
    )
    assert not run.run.checkpoints.exists() and not run.run.lock.exists()


def run_order() -> dict[str, object]:
    """The settings in the order in which differences are told."""
    from trainer.settings import TrainSettings
    from trainer.storage.configuration import to_dict

    return to_dict(TrainSettings("shards", "run", config_name="stories-0.2m"))
