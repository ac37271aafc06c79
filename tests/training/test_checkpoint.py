"""The newest valid checkpoint is found without a hint file, damaged ones are named, and a pickle is never run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from trainer.errors import UserError
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory
from trainer.training import checkpoint
from trainer.zero.optimizer_state import read_optimizer_state


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    for step in (10, 20, 30):
        with atomic_dir.atomic_directory(run.checkpoint(step), checkpoint.KIND, {"step": step}) as staging:
            torch.save({"step": step}, staging / "weights.pt")
    return run


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_newest_is_found_without_a_hint(run: RunDirectory) -> None:
    assert checkpoint.latest_valid(run) == run.checkpoint(30)


@pytest.mark.parametrize("damage", ["flipped", "missing", "unfinished"])
def test_a_damaged_one_is_named_and_passed_over(
    run: RunDirectory, damage: str, capsys: pytest.CaptureFixture
) -> None:
    file = run.checkpoint(30) / "weights.pt"
    if damage == "flipped":
        _flip(file)
    elif damage == "missing":
        file.unlink()
    else:
        (run.checkpoint(30) / atomic_dir.MANIFEST).unlink()
    assert checkpoint.latest_valid(run) == run.checkpoint(20)
    assert "step-000030" in capsys.readouterr().out


def test_none_valid_is_an_error_and_none_at_all_is_not(run: RunDirectory, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        _flip(run.checkpoint(step) / "weights.pt")
    with pytest.raises(UserError, match="--overwrite_output_dir"):
        checkpoint.latest_valid(run)
    assert checkpoint.latest_valid(RunDirectory(tmp_path / "fresh")) is None


def test_old_ones_are_pruned_newest_stay(run: RunDirectory) -> None:
    (run.checkpoints / ".step-000040.half.tmp").mkdir()
    checkpoint.prune(run, keep=2)
    assert run.checkpoint_steps() == [20, 30]


class _Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("planted",)


def test_a_malicious_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a forged manifest that matches."""
    monkeypatch.chdir(tmp_path)
    for number, plant in enumerate((pickle.dumps(_Malicious()), None)):
        folder = tmp_path / str(number)
        with atomic_dir.atomic_directory(folder, checkpoint.KIND, {}) as staging:
            file = staging / "mp_rank_00_model_states.pt"
            if plant is None:
                torch.save({"module": _Malicious()}, file)
            else:
                file.write_bytes(plant)
        checkpoint.check_valid(folder)
        with pytest.raises(UserError, match=r"mp_rank_00_model_states\.pt"):
            read_optimizer_state(folder, 0, 1, "fp32")
    assert not (tmp_path / "planted").exists()


def test_a_failed_write_is_kept_not_raised(tmp_path: Path) -> None:
    """The other ranks wait in a collective of DeepSpeed; an exception would leave them there."""
    writer = checkpoint.SafeCheckpointEngine()
    writer.save({"weights": torch.zeros(1000)}, str(tmp_path / "no such folder" / "weights.pt"))
    assert writer.error is not None and "weights.pt" in writer.error
    writer.save({}, str(tmp_path / "other.pt"))  # not written after a failure
    assert not (tmp_path / "other.pt").exists()
    torch.save({"weights": torch.zeros(1000)}, tmp_path / "weights.pt")
    torch.save({}, tmp_path / "empty.pt")
    sizes = sum((tmp_path / name).stat().st_size for name in ("weights.pt", "empty.pt"))
    assert abs(writer.unwritten_bytes - sizes) < 1000  # names inside the files differ in length
