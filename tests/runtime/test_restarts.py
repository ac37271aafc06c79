"""Restarts by a scheduler are counted, and those that lead nowhere come to an end."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.runtime import restarts


def start(file: Path, monkeypatch: pytest.MonkeyPatch, restart: int, progress: int, most: int = 2) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    restarts.record_restart(file, progress, most)


def test_a_job_that_gets_further_may_be_restarted_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "restarts.json"
    for restart in range(20):
        start(file, monkeypatch, restart, progress=restart * 10)
    assert restarts.read(file)["restarts"] == 19
    assert restarts.read(file)["without_progress"] == 1


def test_a_job_that_gets_nowhere_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "restarts.json"
    for restart in range(3):
        start(file, monkeypatch, restart, progress=0)
    with pytest.raises(
        UserError, match=r"restarted 3 times without getting further than 0.*max_restarts is 2"
    ):
        start(file, monkeypatch, 3, progress=0)


def test_a_start_by_a_person_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "restarts.json"
    for restart in range(3):
        start(file, monkeypatch, restart, progress=0)
    for _ in range(5):
        start(file, monkeypatch, 0, progress=0)
    start(file, monkeypatch, 1, progress=0)
    assert restarts.read(file)["without_progress"] == 1


def test_without_a_scheduler_nothing_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    for _ in range(5):
        restarts.record_restart(tmp_path / "restarts.json", 0, 0)


def test_a_damaged_count_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "restarts.json"
    file.write_text('{"restarts": "many"')
    start(file, monkeypatch, 1, progress=3)
    assert restarts.read(file)["restarts"] == 1
