# ruff: noqa: F401, F811  (fixtures of another folder are imported)
"""Fixtures: runs in which faults are injected, and the same runs undisturbed."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed import Outcome
from tests.faults import forked_ranks, oracle
from tests.training.conftest import gpt2_config, settings, stories
from trainer.shards.read import Shards
from trainer.storage.run_directory import RunDirectory

EPOCHS = 4  # of 13 packs: 26 steps on two ranks
SAVE_STEPS, EVAL_STEPS = 3, 5


def printed(outcomes: list[Outcome]) -> str:
    return "\n".join(outcome.output[-3000:] for outcome in outcomes)


@dataclass
class Case:
    """One run, started by the same command until it is finished."""

    values: dict[str, Any]
    reference: oracle.Reference | None
    num_starts: int = field(default=0, init=False)

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(Path(self.values["output_dir"]))

    @property
    def records(self) -> Path:
        return self.run.path.with_name(f"{self.run.name}.records")

    @property
    def marker(self) -> Path:
        """File that exists once the fault of the current start has happened."""
        return self.run.path.with_name(f"{self.run.name}.fault-{self.num_starts}")

    def start(
        self,
        last_rank_flags: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        **injected: Any,
    ) -> forked_ranks.ForkedRanks:
        """Start the run on two ranks; `injected`: see injection.py."""
        self.num_starts += 1
        self.run.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.run.path.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(self.values), encoding="utf-8")
        for fault in ("kill", "poison"):
            if fault in injected:
                injected[fault] = {**injected[fault], "marker": str(self.marker)}
        faults = json.dumps({"record": str(self.records), "start": self.num_starts, **injected})
        logs = self.run.path.with_suffix(".logs")
        return forked_ranks.start(
            ["--config", str(file)], 2, logs, faults, last_rank_flags, **(environment or {})
        )

    def finish(self, seconds: float = 300.0, **injected: Any) -> str:
        """Start the run, wait until it is finished, and return the output of rank 0."""
        with self.start(**injected) as ranks:
            outcomes = ranks.wait(seconds)
        assert [outcome.status for outcome in outcomes] == [0, 0], printed(outcomes)
        return outcomes[0].output

    def assert_refused(self, message: str, **injected: Any) -> None:
        """Start the run and check that every rank exits with the status of a UserError, and one prints `message`."""
        with self.start(**injected) as ranks:
            outcomes = ranks.wait()
        assert [outcome.status for outcome in outcomes] == [2, 2], printed(outcomes)
        assert re.search(message, printed(outcomes)), printed(outcomes)

    def assert_same(self) -> None:
        assert self.reference is not None
        oracle.assert_same(self.run, self.reference, self.records)


def values_of(stories: Shards, config: Path, output: Path, stage: int, **changes: Any) -> dict[str, Any]:
    """GPT-2 with dropout, a checkpoint every third step, an evaluation every fifth."""
    values = {
        "config_name": str(config), "config_overrides": "", "deepspeed": f"ds_configs/zero{stage}.json",
        "max_steps": 0, "num_train_epochs": EPOCHS, "save_steps": SAVE_STEPS, "save_total_limit": 2,
        "eval_shards": str(stories.path), "eval_steps": EVAL_STEPS, "eval_max_problems": 8,
        "timeout_seconds": 60, "heartbeat_timeout_seconds": 30,
    }  # fmt: skip
    return settings(stories, output, **{**values, **changes})


@pytest.fixture(scope="session")
def references(
    tmp_path_factory: pytest.TempPathFactory,
    stories: Shards,
    gpt2_config: Path,
) -> Callable[[int], oracle.Reference]:
    """Stage -> the undisturbed run on two ranks, made on first use."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @functools.cache
    def make(stage: int) -> oracle.Reference:
        case = Case(values_of(stories, gpt2_config, folder / f"zero{stage}", stage), None)
        case.finish()
        reference = oracle.Reference.from_run(case.values)
        oracle.assert_same(case.run, reference, case.records)
        return reference

    return make


@pytest.fixture
def make_case(
    tmp_path: Path,
    stories: Shards,
    gpt2_config: Path,
    references: Callable[[int], oracle.Reference],
) -> Callable[..., Case]:
    """(stage, name, changes) -> a run with its reference. The changes must not affect its numbers."""

    def make(stage: int, name: str = "run", **changes: Any) -> Case:
        return Case(values_of(stories, gpt2_config, tmp_path / name, stage, **changes), references(stage))

    return make
