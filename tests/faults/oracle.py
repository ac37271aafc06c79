"""The oracle of all fault tests: a disturbed run must end bit for bit like the undisturbed one.

Losses, gradient norms, evaluations, weights and moments are equal; every example is trained on exactly once an epoch; no
partial directory is visible and no temporary file is left.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from trainer.runtime import directory_lock
from trainer.settings import TrainSettings
from trainer.shards.methods import view_of
from trainer.shards.read import Shards
from trainer.storage import atomic_dir
from trainer.storage.configuration import from_dict
from trainer.storage.run_directory import RunDirectory
from trainer.training.batches import PackedDataset
from trainer.zero.checksum_reader import ChecksumReader
from trainer.zero.optimizer_state import read_optimizer_state

_MEASURED = {"seconds", "run_seconds", "tokens_per_second", "mfu", "memory_bytes"}


def trajectory(run: RunDirectory) -> tuple[dict[int, dict], dict[int, dict]]:
    """Return (steps, evaluations) by step, without measured values; the last line of a step is valid."""
    steps: dict[int, dict] = {}
    evaluations: dict[int, dict] = {}
    if not run.metrics.exists():
        return steps, evaluations
    for text in run.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "evaluation" in line:
            evaluations[line["step"]] = line["evaluation"]
        else:
            steps[line["step"]] = {key: value for key, value in line.items() if key not in _MEASURED}
    return steps, evaluations


def state_digest(checkpoint: Path) -> str:
    """Verify a checkpoint's digests and return the SHA-256 of all its weights and moments."""
    atomic_dir.verify_digests(checkpoint)
    facts = atomic_dir.read_manifest(checkpoint)["facts"]
    state = read_optimizer_state(checkpoint, facts["zero_stage"], facts["world_size"], facts["dtype"])
    digest = hashlib.sha256(f"{state.step}".encode())
    tensors = {("weight", name): tensor for name, tensor in state.weights.tensors.items()}
    tensors |= {(key, name): tensor for key, named in state.moments.items() for name, tensor in named.items()}
    with ChecksumReader() as reader:
        for key in sorted(tensors):
            digest.update(f"{key}{tensors[key].shape}".encode())
            for byte_range in tensors[key].ranges:
                digest.update(reader.tensor(byte_range, 0, byte_range.num_elements).numpy().tobytes())
        reader.verify_checksums()
    assert len(tensors) > 20
    return digest.hexdigest()


@dataclass(frozen=True)
class Reference:
    """A finished run without faults."""

    run: RunDirectory
    settings: TrainSettings
    steps: dict[int, dict[str, Any]]
    evaluations: dict[int, dict[str, Any]]
    digest: str

    @classmethod
    def from_run(cls, values: dict[str, Any]) -> Reference:
        """Return the reference of the finished run with these settings."""
        settings = from_dict(TrainSettings, values, "the test")
        run = RunDirectory(Path(settings.output_dir))
        steps, evaluations = trajectory(run)
        return cls(run, settings, steps, evaluations, state_digest(run.checkpoint(max(steps))))


def assert_same(run: RunDirectory, reference: Reference, records: Path | None = None) -> None:
    """Check that a finished run equals the reference bit for bit. `records`: the packs recorded by injection.py."""
    steps, evaluations = trajectory(run)
    assert steps == reference.steps
    assert evaluations == reference.evaluations
    last = max(reference.steps)
    assert atomic_dir.read_manifest(run.checkpoint(last))["facts"]["finished"]
    assert state_digest(run.checkpoint(last)) == reference.digest
    assert run.checkpoint_steps() == reference.run.checkpoint_steps()
    assert leftovers(run) == []
    if records is not None:
        assert_each_example_once(records, reference)


def assert_same_so_far(run: RunDirectory, reference: Reference) -> None:
    """Check that all logged steps of an unfinished run equal the reference, and all visible checkpoints are valid."""
    steps, evaluations = trajectory(run)
    for step, values in steps.items():
        assert values == reference.steps[step], f"step {step}"
    assert evaluations.items() <= reference.evaluations.items()
    for step in run.checkpoint_steps():
        atomic_dir.verify_digests(run.checkpoint(step))


def assert_each_example_once(records: Path, reference: Reference) -> None:
    """Check that every example entered exactly one micro-batch an epoch; of a repeated step the last start counts."""
    settings = reference.settings
    data = PackedDataset(
        Shards.open(settings.train_shards),
        settings.method,
        view_of(settings.method),
        settings.pack_length,
        settings.seed,
    )
    taken: dict[int, tuple[int, list[dict]]] = {}
    for file in sorted(records.glob("*.jsonl")):
        start = int(file.name.split("-")[0])
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if taken.get(line["step"], (0, []))[0] < start:
                taken[line["step"]] = (start, [])
            taken[line["step"]][1].append(line)
    assert sorted(taken) == sorted(reference.steps)
    packs = [line for _, lines in taken.values() for line in lines]
    seen = Counter(
        (line["pack"] // data.packs_per_epoch, problem) for line in packs for problem in line["problems"]
    )
    epochs = round(settings.num_train_epochs)
    assert len(seen) == epochs * data.num_examples, "an example was never trained on"
    assert set(seen.values()) == {1}, "an example was trained on twice"


def leftovers(run: RunDirectory) -> list[str]:
    """Return temporary files, lock and heartbeats of a run; its last few stale locks are kept on purpose."""
    found = [
        path.relative_to(run.path).as_posix()
        for path in run.path.rglob(".*")
        if not any(part.startswith(f".{run.lock.name}.") for part in path.relative_to(run.path).parts)
    ]
    locks = list(run.path.glob(f".{run.lock.name}.*"))
    assert len(locks) <= directory_lock._MAX_STALE_LOCKS + 1, locks
    live = [path.name for path in (run.lock, run.heartbeats) if path.exists()]
    return sorted(found + live)


def find_processes(name: str, value: str) -> list[psutil.Process]:
    """Return running processes with this environment variable, which all descendants of a command inherit."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(name) == value:
                found.append(process)
        except (psutil.Error, OSError):  # another user's, or just ended
            continue
    return found
