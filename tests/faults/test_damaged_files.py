"""The files of a killed run are damaged: it resumes from a valid checkpoint bit for bit, or names the damaged file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.conftest import Case, values_of
from tests.faults.oracle import Reference
from tests.training.test_resharded import _damage as flip_optimizer
from trainer.shards.read import Shards
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory

pytestmark = pytest.mark.faults

OLDER, NEWEST = 15, 18


@pytest.fixture(scope="module")
def killed(
    tmp_path_factory: pytest.TempPathFactory,
    stories: Shards,
    gpt2_config: Path,
    references: Callable[[int], Reference],
) -> Case:
    """A run killed at step 20, with two checkpoints and metrics of later steps."""
    folder = tmp_path_factory.mktemp("killed")
    case = Case(values_of(stories, gpt2_config, folder / "run", 1), references(1))
    with case.start(kill={"instant": "after the update", "rank": 0, "step": 20}) as ranks:
        ranks.wait()
    assert case.marker.exists() and case.run.checkpoint_steps() == [OLDER, NEWEST]
    return case


@pytest.fixture
def copy(killed: Case, tmp_path: Path) -> Case:
    """A copy of `killed` to be damaged."""
    copied = Case({**killed.values, "output_dir": str(tmp_path / "run")}, killed.reference)
    shutil.copytree(killed.run.path, copied.run.path)
    shutil.copytree(killed.records, copied.records)
    copied.num_starts = killed.num_starts
    return copied


def _optimizer_file(run: RunDirectory, rank: int) -> Path:
    return run.checkpoint(NEWEST) / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def _truncate(run: RunDirectory) -> None:
    file = _optimizer_file(run, 1)
    os.truncate(file, file.stat().st_size // 2)


def _manifest(content: bytes) -> Callable[[RunDirectory], None]:
    return lambda run: _write(run.checkpoint(NEWEST) / atomic_dir.MANIFEST, content)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


PASSED_OVER: dict[str, Callable[[RunDirectory], Any]] = {
    "a file of a rank truncated": _truncate,
    "a file of a rank flipped": lambda run: flip_optimizer(run.checkpoint(NEWEST)),
    "a file of a rank missing": lambda run: _optimizer_file(run, 0).unlink(),
    "its config missing": lambda run: (run.checkpoint(NEWEST) / "model" / "config.json").unlink(),
    "an empty manifest": _manifest(b""),
    "a manifest of zeros": _manifest(b"\0" * 300),
    "a manifest of something else": _manifest(b'{"format": 1, "files": []}'),
}


@pytest.mark.parametrize("damage", PASSED_OVER)
def test_a_damaged_checkpoint_is_passed_over(copy: Case, damage: str) -> None:
    PASSED_OVER[damage](copy.run)
    output = copy.finish()
    assert f"checkpoint skipped: {copy.run.checkpoint(NEWEST)}" in output
    assert f"resumed from {copy.run.checkpoint(OLDER)}" in output
    copy.assert_same()


def test_hint_files_and_leftovers_are_ignored(copy: Case) -> None:
    """Foreign files in a run directory and damaged small files do not matter."""
    run = copy.run
    (run.checkpoints / "latest").write_text(f"step-{OLDER:06d}")  # DeepSpeed's hint, stale
    (run.checkpoints / "latest_universal").touch()
    (run.checkpoints / f"step-{NEWEST + 1:06d}").write_text("a file")
    staging = run.checkpoints / f".step-{NEWEST + 2:06d}.another-host-77-0123abcd.tmp"
    shutil.copytree(run.checkpoint(NEWEST), staging)
    (run.path / ".initial-abcd.tmp").mkdir()
    with open(run.metrics, "ab") as file:
        file.write(b'{"step": 21, "loss": 1.0, "evaluation": {"loss": 1.0}\n\xff\xfe{"step"')
    for path in (run.restarts, run.environment, run.ds_config):
        path.write_bytes(b"\xff{")
    shutil.rmtree(run.model)
    run.heartbeats.mkdir(exist_ok=True)
    (run.heartbeats / "rank-00000.json").write_text("{")
    output = copy.finish()
    assert f"resumed from {run.checkpoint(NEWEST)}" in output
    (run.checkpoints / f"step-{NEWEST + 1:06d}").unlink()
    copy.assert_same()


def test_an_unfinished_directory_with_a_checkpoints_name_is_passed_over(copy: Case) -> None:
    """A directory without a manifest, which the trainer never creates, is not removed either."""
    foreign = copy.run.checkpoint(999)
    foreign.mkdir()
    assert f"checkpoint skipped: {foreign} is not finished" in copy.finish()
    foreign.rmdir()
    copy.assert_same()


def test_without_a_valid_checkpoint_nothing_starts_from_zero(copy: Case) -> None:
    for step in (OLDER, NEWEST):
        flip_optimizer(copy.run.checkpoint(step))
    copy.assert_refused("holds 2 checkpoint.s. but none is valid; .*--overwrite_output_dir")
    assert copy.run.checkpoint_steps() == [OLDER, NEWEST]


def test_settings_that_cannot_be_read_are_named(copy: Case) -> None:
    copy.run.settings.write_bytes(b"seed: [1")
    copy.assert_refused(r"settings\.yaml cannot be read")
    assert copy.run.checkpoint_steps() == [OLDER, NEWEST]


def test_flipped_tokens_are_not_trained_on(copy: Case, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(copy.values["train_shards"], shards)
    tokens = bytearray((shards / "tokens.bin").read_bytes())
    tokens[len(tokens) // 2] ^= 1
    (shards / "tokens.bin").write_bytes(tokens)
    copy.values["train_shards"] = str(shards)
    copy.assert_refused(r"tokens\.bin is corrupt: its digest is not the manifest's")


class _Planted:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_planted_pickle_is_not_run_by_resuming(copy: Case, tmp_path: Path) -> None:
    """Even with a forged manifest that matches. Without it the run resumes from the previous checkpoint."""
    marker, checkpoint = tmp_path / "was-run", copy.run.checkpoint(NEWEST)
    file = _optimizer_file(copy.run, 1)
    content = torch.load(file, weights_only=False)
    torch.save({**content, "hyperparameters": _Planted(f"touch {marker}")}, file)
    facts = atomic_dir.read_manifest(checkpoint)["facts"]
    (checkpoint / atomic_dir.MANIFEST).unlink()
    staging = checkpoint.rename(tmp_path / "staging")
    atomic_dir.publish(staging, checkpoint, "checkpoint", facts, atomic_dir.digest_files(staging))
    copy.assert_refused(rf"{file.name} is refused: it asks for (posix|nt)\.system")
    assert not marker.exists()
    torch.load(file, weights_only=False)  # the planted pickle does work
    assert marker.exists()
    shutil.rmtree(checkpoint)
    copy.finish()
    copy.assert_same()
