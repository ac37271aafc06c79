"""The soak, for some minutes (a long one: make soak)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.faults.soak import in_words, soak

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def test_a_study_that_is_disturbed_all_the_time_ends_as_if_it_had_not_been() -> None:
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
    try:
        outcome = soak(folder, minutes=6, seed=0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(in_words(outcome))
    assert len(outcome.events) >= 3 and outcome.starts >= 3, "it was disturbed"
    assert outcome.lost == []
    assert 0 < outcome.useful_seconds < outcome.seconds
