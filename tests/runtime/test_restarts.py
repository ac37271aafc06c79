"""The count of scheduler restarts and its limit without progress."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.runtime import restarts


def start(file: Path, monkeypatch: pytest.MonkeyPatch, restart: int, progress: int) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    restarts.record_restart(file, progress, max_restarts=2)


def test_restarts_with_progress_are_unlimited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "restarts.json"
    for restart in range(20):
        start(file, monkeypatch, restart, progress=restart * 10)
    assert restarts.read_restarts(file)["restarts"] == 19
    assert restarts.read_restarts(file)["without_progress"] == 1


def test_restarts_without_progress_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "restarts.json"
    for restart in range(3):
        start(file, monkeypatch, restart, progress=0)
    with pytest.raises(
        UserError, match=r"restarted 3 times without getting further than 0.*max_restarts is 2"
    ):
        start(file, monkeypatch, 3, progress=0)


def test_a_manual_start_resets_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "restarts.json"
    for restart in range(3):
        start(file, monkeypatch, restart, progress=0)
    for _ in range(5):
        start(file, monkeypatch, 0, progress=0)
    start(file, monkeypatch, 1, progress=0)
    assert restarts.read_restarts(file)["without_progress"] == 1


def test_starts_without_a_scheduler_are_unlimited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    for _ in range(5):
        restarts.record_restart(tmp_path / "restarts.json", 0, 0)


def test_an_invalid_file_resets_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "restarts.json"
    file.write_text('{"restarts": "many"')
    start(file, monkeypatch, 1, progress=3)
    assert restarts.read_restarts(file)["restarts"] == 1
