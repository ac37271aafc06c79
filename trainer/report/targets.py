"""The paper's values as a data file, targets.yaml: each with how it is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

SAME_SIZE = 0.05  # GPT-2 medium is called 345M, 355M and has 354,823,168 parameters


@dataclass(frozen=True)
class Target:
    """`accuracy` in percent. `method` "" belongs to no column. `mark` is a key of Targets.marks."""

    data: str
    model: str
    parameters: int
    method: str
    accuracy: float
    mark: str
    source: str


@dataclass(frozen=True)
class Targets:
    paper: str
    url: str
    marks: dict[str, str]
    notes: tuple[str, ...]
    targets: tuple[Target, ...]

    def of_data(self, data: str) -> list[Target]:
        return [target for target in self.targets if target.data == data]


@cache
def load_targets() -> Targets:
    """The file of this package."""
    text = (resources.files("trainer.report") / "targets.yaml").read_text(encoding="utf-8")
    record: dict[str, Any] = yaml.safe_load(text)
    targets = tuple(Target(**entry) for entry in record["targets"])
    assert {target.mark for target in targets} <= set(record["marks"])
    return Targets(record["paper"], record["url"], record["marks"], tuple(record["notes"]), targets)


def same_size(parameters: int, target: Target) -> bool:
    """Whether a model of ours is as large as the target's."""
    return abs(parameters - target.parameters) <= SAME_SIZE * target.parameters
