"""One rank of two computes NaN or has other settings: both end, and the message names the rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import oracle
from tests.faults.conftest import Case

pytestmark = pytest.mark.faults

MESSAGES = {
    "loss": r"rank 1: step 8: the loss on rank 1 is nan; problems of this rank: stories",
    "gradient": r"step 8: the gradient is not finite \(the loss is \d\.\d+\); problems of this rank: stories",
}


@pytest.mark.parametrize("what", MESSAGES)
@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_nan_and_inf_never_reach_the_weights(make_case: Callable[..., Case], what: str, stage: int) -> None:
    """On rank 1 alone, once: the run ends, and resumes from its last checkpoint with the reference's results."""
    case = make_case(stage)
    case.assert_refused(MESSAGES[what], poison={"what": what, "rank": 1, "step": 8})
    assert case.marker.exists()
    assert case.run.checkpoint_steps() == [3, 6]
    assert case.reference is not None
    oracle.assert_same_so_far(case.run, case.reference)
    case.finish()
    case.assert_same()


def test_ranks_with_different_settings_are_refused(make_case: Callable[..., Case], tmp_path: Path) -> None:
    """Each of these would change the results, or let a rank wait forever."""
    changes = {
        "learning_rate": "1e-4",
        "eval_steps": "7",
        "max_steps": "5",
        "timeout_seconds": "99",
        "output_dir": str(tmp_path / "elsewhere"),
        "gradient_accumulation_steps": "2",
    }
    case = make_case(1)
    flags = tuple(word for name, value in changes.items() for word in (f"--{name}", value))
    case.assert_refused(
        "settings: rank 1 differs from rank 0 in " + ", ".join(sorted(changes, key=_setting_names().index)),
        last_rank_flags=flags,
    )
    assert not case.run.checkpoints.exists() and not case.run.lock.exists()


def _setting_names() -> list[str]:
    """Return the settings in the order in which differences are listed."""
    from dataclasses import asdict

    from trainer.settings import TrainSettings

    return list(asdict(TrainSettings("shards", "run", config_name="stories-0.2m")))
