"""The soak test for six minutes (longer: make soak)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.faults.soak import soak, summary

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def test_a_disturbed_study_ends_like_an_undisturbed_one() -> None:
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
    try:
        outcome = soak(folder, minutes=6, seed=0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(summary(outcome))
    assert len(outcome.events) >= 3 and outcome.starts >= 3, "it was disturbed"
    assert outcome.lost == []
    assert 0 < outcome.useful_seconds < outcome.seconds
