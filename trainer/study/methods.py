"""The `methods` section of a study file: training methods, and pairs that evaluate several trained models together.

A pair has no training of its own: it adds the runs of its models to the study. Pairs share these runs: each is trained
once for a data set, model and seed.
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

SINGLE_MODEL_METHODS = ("answer_only", "cot", "socratic")
ROLE_METHODS = tuple(name for name in METHODS if name not in SINGLE_MODEL_METHODS)  # the models of pairs
FEW_SHOT = "few_shot"  # the pretrained model, prompted with exemplars
SOLVER = "solver"


@dataclass(frozen=True)
class Pair:
    """Training methods of the models beside the solver. Without a decomposer, gold sub-questions are used."""

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
KNOWN_METHODS = (*SINGLE_MODEL_METHODS, *PAIRS, FEW_SHOT, *ROLE_METHODS)


@dataclass(frozen=True)
class MethodEntry:
    """A method, its models and data sets. `settings`: of its training; of a pair or few-shot, of its evaluation."""

    name: str
    models: tuple[str, ...]
    data: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    decomposer_model: str = ""  # model of the decomposer and planner; "": the solver's
    names_models: bool = False  # whether the file lists its models

    @property
    def pair(self) -> Pair | None:
        return PAIRS.get(self.name)

    @property
    def role_methods(self) -> tuple[str, ...]:
        """Training methods of the models of a pair; empty for other methods."""
        if not self.pair:
            return ()
        return tuple(filter(None, (self.pair.planner, self.pair.decomposer, SOLVER)))


def read_methods(
    values: dict[str, Any], models: Iterable[str], data: Iterable[str], where: str
) -> dict[str, MethodEntry]:
    """Return the checked entries by name. Raises UserError with the key path of the fault."""
    models, data = list(models), list(data)
    found = {}
    for name, given in checks.named_settings(values, "methods", where).items():
        if name not in KNOWN_METHODS:
            raise UserError(
                f"{where}: methods: {name!r} is not a method; choose from {', '.join(KNOWN_METHODS)}{did_you_mean(name, KNOWN_METHODS)}"
            )
        found[name] = _entry(name, given, models, data, f"{where}: methods.{name}")
    return found


def _entry(name: str, given: dict[str, Any], models: list[str], data: list[str], where: str) -> MethodEntry:
    names_models = "models" in given
    for_models = checks.select_names(given.pop("models", None), models, f"{where}.models")
    for_data = checks.select_names(given.pop("data", None), data, f"{where}.data")
    decomposer_model = ""
    if name in PAIRS and PAIRS[name].decomposer and "decomposer_model" in given:
        decomposer_model = str(given.pop("decomposer_model"))
        checks.check_choice(decomposer_model, models, f"{where}.decomposer_model")
    if name in PAIRS or name == FEW_SHOT:
        if "mode" in given:
            raise UserError(f"{where}: mode is decided by the method; remove it")
        rename_old_keys(EvaluateSettings, given, where, terminal.deprecation)
        settings = {"exemplars": "-", **given, "mode": FEW_SHOT} if name == FEW_SHOT else given
        checks.check_settings(EvaluateSettings, settings, where)
    else:
        checks.check_settings(TrainSettings, given, where)
    return MethodEntry(name, tuple(for_models), tuple(for_data), given, decomposer_model, names_models)


def trained_methods(entries: dict[str, MethodEntry]) -> set[str]:
    """Return the methods that are trained for every model and data set of their entry.

    A role method that a pair uses is trained where the pair requires it; its entry only adds settings, unless it lists
    models.
    """
    used_by_pairs = {method for entry in entries.values() for method in entry.role_methods}
    return {
        name
        for name, entry in entries.items()
        if name in SINGLE_MODEL_METHODS
        or (name in ROLE_METHODS and (entry.names_models or name not in used_by_pairs))
    }
