"""The `methods` section of a study file: training methods, few_shot, and pairs that evaluate trained models together.

A pair adds the training runs of its models to the study. Pairs share training runs: a method is trained once per data
set, model and seed.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from trainer.errors import UserError
from trainer.runtime import terminal
from trainer.settings import FEW_SHOT, METHODS, EvaluateSettings, TrainSettings
from trainer.storage.configuration import did_you_mean, rename_old_keys
from trainer.study import checks

SINGLE_MODEL_METHODS = ("answer_only", "cot", "socratic")
ROLE_METHODS = tuple(name for name in METHODS if name not in SINGLE_MODEL_METHODS)  # for the models of pairs
SOLVER = "solver"


@dataclass(frozen=True)
class Pair:
    """Training methods of a pair's decomposer and planner. The pair's solver always has the method SOLVER."""

    decomposer: str = ""  # "": gold sub-questions are used
    planner: str = ""  # "": no planner


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
    """An entry under `methods` of the study file: a method, and the models and data sets for which it is used."""

    name: str
    models: tuple[str, ...]
    data: tuple[str, ...]
    settings: dict[str, Any]  # evaluation settings for a pair or few_shot, else training settings
    decomposer_model: str  # model of the decomposer and planner; "": the solver's model
    lists_models: bool  # True: the entry in the file has the key `models`

    @property
    def pair(self) -> Pair | None:
        return PAIRS.get(self.name)

    @property
    def role_methods(self) -> tuple[str, ...]:
        """Training methods of the pair's models; () if the method is not a pair."""
        if not self.pair:
            return ()
        return tuple(filter(None, (self.pair.planner, self.pair.decomposer, SOLVER)))


def read_methods(
    values: dict[str, Any], models: Collection[str], data: Collection[str], where: str
) -> dict[str, MethodEntry]:
    """Check the entries and return a dict name -> entry. Raises UserError, with the key path, if an entry is not valid."""
    entries = {}
    for name, settings in checks.named_settings(values, "methods", where).items():
        if name not in KNOWN_METHODS:
            raise UserError(
                f"{where}: methods: {name!r} is not a method; choose from {', '.join(KNOWN_METHODS)}{did_you_mean(name, KNOWN_METHODS)}"
            )
        entries[name] = _read_entry(name, settings, models, data, f"{where}: methods.{name}")
    return entries


def _read_entry(
    name: str, settings: dict[str, Any], models: Collection[str], data: Collection[str], where: str
) -> MethodEntry:
    lists_models = "models" in settings
    entry_models = checks.select_names(settings.pop("models", None), models, f"{where}.models")
    entry_data = checks.select_names(settings.pop("data", None), data, f"{where}.data")
    decomposer_model = ""
    if name in PAIRS and PAIRS[name].decomposer and "decomposer_model" in settings:
        decomposer_model = str(settings.pop("decomposer_model"))
        checks.check_choice(decomposer_model, models, f"{where}.decomposer_model")
    if name in PAIRS or name == FEW_SHOT:
        if "mode" in settings:
            raise UserError(f"{where}: mode is decided by the method; remove it")
        rename_old_keys(EvaluateSettings, settings, where, terminal.deprecation)
        few_shot = {"exemplars": "-", **settings, "mode": FEW_SHOT}
        checks.check_settings(EvaluateSettings, few_shot if name == FEW_SHOT else settings, where)
    else:
        checks.check_settings(TrainSettings, settings, where)
    return MethodEntry(name, entry_models, entry_data, settings, decomposer_model, lists_models)


def trained_methods(entries: dict[str, MethodEntry]) -> set[str]:
    """Return the methods that are trained with all models and data sets of their own entry, even if no pair needs this."""
    # A role method that a pair uses is trained only for that pair, unless its own entry has the key `models`.
    used_by_pairs = {method for entry in entries.values() for method in entry.role_methods}
    return {
        name
        for name, entry in entries.items()
        if name in SINGLE_MODEL_METHODS
        or (name in ROLE_METHODS and (entry.lists_models or name not in used_by_pairs))
    }
