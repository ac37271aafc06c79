"""What stands under `methods` in a study file: students that are trained, and ways to ask several of them together.

A composite has no training of its own. It evaluates students of other runs of the study, which it implies: each is
trained once for a data set, model and seed, whoever needs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import UserError
from trainer.runtime import terminal
from trainer.settings import METHODS, EvaluateSettings, TrainSettings
from trainer.storage.configuration import did_you_mean, rename_old_keys
from trainer.study import checks

ALONE = ("answer_only", "cot", "socratic")  # students that solve a problem by themselves
ROLE_METHODS = tuple(name for name in METHODS if name not in ALONE)  # halves of a pair, and planners
FEW_SHOT = "few_shot"  # the pretrained model itself, shown exemplars
SOLVER = "solver"


@dataclass(frozen=True)
class Pair:
    """Training methods that play the parts beside the solver. Without a decomposer the gold sub-questions guide it."""

    decomposer: str = ""
    planner: str = ""


PAIRS = {
    "iterative_ahead": Pair("decomposer"),
    "iterative_interleaved": Pair("decomposer_interleaved"),
    "gold_subquestions": Pair(),
    "iterative_ahead_operators": Pair("decomposer_operators", "planner_operators"),
    "iterative_ahead_equations": Pair("decomposer_equations", "planner_equations"),
    "iterative_interleaved_operators": Pair("decomposer_interleaved_operators", "planner_operators"),
    "iterative_interleaved_equations": Pair("decomposer_interleaved_equations", "planner_equations"),
}
KNOWN = (*ALONE, *PAIRS, FEW_SHOT, *ROLE_METHODS)


@dataclass(frozen=True)
class MethodEntry:
    """A method with the models and data sets it is for. `settings`: of its training, or of a composite's evaluation."""

    name: str
    models: tuple[str, ...]
    data: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    decomposer_model: str = ""  # which model plays decomposer and planner; "": the solver's own
    restricted: bool = False  # whether the file names its models

    @property
    def pair(self) -> Pair | None:
        return PAIRS.get(self.name)

    @property
    def parts(self) -> tuple[str, ...]:
        """Training methods whose students it may ask."""
        if not self.pair:
            return ()
        return tuple(filter(None, (self.pair.planner, self.pair.decomposer, SOLVER)))


def read_methods(
    values: dict[str, Any], models: Iterable[str], data: Iterable[str], where: str
) -> dict[str, MethodEntry]:
    """Raises UserError with the key path of what is wrong."""
    models, data = list(models), list(data)
    found = {}
    for name, given in checks.entries(checks.required(values, "methods", where), f"{where}: methods").items():
        if name not in KNOWN:
            raise UserError(
                f"{where}: methods: {name!r} is not a method; choose from {', '.join(KNOWN)}{did_you_mean(name, KNOWN)}"
            )
        found[name] = _entry(name, given, models, data, f"{where}: methods.{name}")
    return found


def _entry(name: str, given: dict[str, Any], models: list[str], data: list[str], where: str) -> MethodEntry:
    restricted = "models" in given
    for_models = checks.chosen(given.pop("models", None), models, f"{where}.models")
    for_data = checks.chosen(given.pop("data", None), data, f"{where}.data")
    decomposer_model = ""
    if name in PAIRS and PAIRS[name].decomposer and "decomposer_model" in given:
        decomposer_model = str(given.pop("decomposer_model"))
        checks.one_of(decomposer_model, models, f"{where}.decomposer_model")
    if name in PAIRS or name == FEW_SHOT:
        if "mode" in given:
            raise UserError(f"{where}: mode is decided by the method; remove it")
        rename_old_keys(EvaluateSettings, given, where, terminal.deprecation)
        shown = {"exemplars": "-", **given, "mode": FEW_SHOT} if name == FEW_SHOT else given
        checks.check(EvaluateSettings, shown, where)
    else:
        checks.check(TrainSettings, given, where)
    return MethodEntry(name, tuple(for_models), tuple(for_data), given, decomposer_model, restricted)


def trained_alone(entries: dict[str, MethodEntry]) -> dict[str, MethodEntry]:
    """Entries that ask for a training wherever they stand.

    A part that a composite implies is trained where the composite needs it; its entry only adds settings, unless it
    names models of its own.
    """
    implied = {part for entry in entries.values() for part in entry.parts}
    return {
        name: entry
        for name, entry in entries.items()
        if name in ALONE or (name in ROLE_METHODS and (entry.restricted or name not in implied))
    }
