"""Expand a study file into runs: training runs, runs that evaluate a pair, and few-shot runs (see `RunSpec`)."""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.models import presets
from trainer.settings import ConvertSettings, EvaluateSettings, TrainSettings
from trainer.storage.configuration import from_dict
from trainer.storage.run_directory import RunDirectory, StudyDirectory, evaluation_name
from trainer.study import checks
from trainer.study.data_sets import TRAIN, VALIDATION, ProblemSet
from trainer.study.methods import FEW_SHOT, SINGLE_MODEL_METHODS, SOLVER, MethodEntry, trained_methods


@dataclass(frozen=True)
class RunSpec:
    """Directory of one run, and settings of its training, conversion and evaluations.

    A training run trains, converts and evaluates one model. (A model that only works in a pair is not evaluated alone.) The
    run of a pair evaluates the models of `trained_runs` together. A few-shot run evaluates a pretrained model.
    """

    directory: RunDirectory
    train: TrainSettings | None  # None if the run trains no model
    convert: ConvertSettings | None  # None if the run trains no model
    evaluations: tuple[EvaluateSettings, ...]
    num_ranks: int = 1
    trained_runs: tuple[str, ...] = ()  # pairs only: names of the training runs of both models
    dependent_evaluations: tuple[EvaluateSettings, ...] = ()  # pairs' evaluations that use this run's export

    @property
    def name(self) -> str:
        return self.directory.name


@dataclass(frozen=True)
class ModelEntry:
    """An entry under `models` of the study file."""

    name: str
    settings: dict[str, Any]  # training settings
    num_ranks: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class StudyGrid:
    """Checked sections of a study file. A run is one combination of data set, model, method and seed."""

    where: str  # prefix of error messages
    directory: StudyDirectory
    data: dict[str, dict[str, ProblemSet]]  # data set -> name of the problem set -> problem set
    models: dict[str, ModelEntry]
    methods: dict[str, MethodEntry]
    train: dict[str, Any]
    convert: dict[str, Any]
    evaluate: dict[str, Any]
    evaluations: list[dict[str, Any]]  # variants; the settings of a variant override `evaluate`


def expand(grid: StudyGrid) -> tuple[RunSpec, ...]:
    """Return all runs, each after the runs whose models it evaluates. Raises UserError for contradictory settings."""
    runs: dict[str, RunSpec] = {}
    trained = trained_methods(grid.methods)
    seeds = dict.fromkeys(seed for model in grid.models.values() for seed in model.seeds)
    # Models vary fastest, so that the durations of all sizes are known early (see estimate.py).
    combinations = itertools.product(seeds, grid.data, grid.methods.values(), grid.models.values())
    for seed, data, entry, model in combinations:
        if model.name not in entry.models or data not in entry.data or seed not in model.seeds:
            continue
        new_runs: list[RunSpec] = []
        if entry.pair:
            new_runs = _pair_runs(grid, entry, data, model, seed)
        elif entry.name in trained:
            new_runs = [_training_run(grid, entry.name, data, model, seed)]
        elif entry.name == FEW_SHOT and seed == model.seeds[0]:  # prompts do not depend on the seed
            new_runs = [_few_shot_run(grid, entry, data, model, seed)]
        for run in new_runs:
            runs.setdefault(run.name, run)
    for run in list(runs.values()):
        for name in run.trained_runs:
            evaluations = runs[name].dependent_evaluations + run.evaluations
            runs[name] = dataclasses.replace(runs[name], dependent_evaluations=evaluations)
    return tuple(runs.values())


def _training_run(grid: StudyGrid, method: str, data: str, model: ModelEntry, seed: int) -> RunSpec:
    directory = grid.directory.run(f"{data}.{method}.{model.name}.s{seed}")
    own = grid.methods[method].settings if method in grid.methods else {}
    sets = grid.data[data]
    values = {
        **grid.train,
        **model.settings,
        **own,
        "train_shards": sets[TRAIN].shards.output_dir,
        "eval_shards": sets[VALIDATION].shards.output_dir if VALIDATION in sets else "",
        "output_dir": str(directory.path),
        "method": method,
        "model_label": model.name,
        "seed": seed,
    }
    train = from_dict(TrainSettings, values, f"{grid.where}: run {directory.name}")
    _check_files(train, model, grid.where)
    paths = {"checkpoint_dir": str(directory.path), "output_dir": str(directory.export), "overwrite": True}
    convert = from_dict(ConvertSettings, {**grid.convert, **paths}, f"{grid.where}: convert")
    evaluations: tuple[EvaluateSettings, ...] = ()
    if method in SINGLE_MODEL_METHODS:
        models = {"model_name_or_path": str(directory.export)}
        evaluations = _evaluations(grid, directory, data, method, models, {})
    return RunSpec(directory, train, convert, evaluations, model.num_ranks)


def _pair_runs(grid: StudyGrid, entry: MethodEntry, data: str, model: ModelEntry, seed: int) -> list[RunSpec]:
    """Return the training runs of a pair's models, and then the run that evaluates the pair."""
    assert entry.pair
    decomposer = grid.models[entry.decomposer_model or model.name]
    trained = {
        method: _training_run(grid, method, data, model if method == SOLVER else decomposer, seed)
        for method in entry.role_methods
    }
    exports = {method: str(run.directory.export) for method, run in trained.items()}
    label = model.name if decomposer == model else f"{decomposer.name}+{model.name}"
    directory = grid.directory.run(f"{data}.{entry.name}.{label}.s{seed}")
    models = {
        "solver": exports[SOLVER],
        "decomposer": exports.get(entry.pair.decomposer, ""),
        "planner": exports.get(entry.pair.planner, ""),
        "subquestions": "decomposer" if entry.pair.decomposer else "gold",
        "mode": "auto",
    }
    evaluations = _evaluations(grid, directory, data, entry.name, models, entry.settings)
    if not any(settings.planner for settings in evaluations):  # all plans are gold: no planner is needed
        trained.pop(entry.pair.planner, None)
    names = tuple(run.name for run in trained.values())
    return [*trained.values(), RunSpec(directory, None, None, evaluations, model.num_ranks, names)]


def _few_shot_run(grid: StudyGrid, entry: MethodEntry, data: str, model: ModelEntry, seed: int) -> RunSpec:
    directory = grid.directory.run(f"{data}.{FEW_SHOT}.{model.name}.s{seed}")
    pretrained = {**grid.train, **model.settings}.get("model_name_or_path", "")
    if not pretrained:
        raise UserError(
            f"{grid.where}: methods.{FEW_SHOT}: model {model.name} has random weights; only a pretrained one "
            "(model_name_or_path) can be evaluated without training: list such models with 'models: [...]'"
        )
    exemplars = entry.settings.get("exemplars", "")
    checks.check_path_exists(pretrained, f"{grid.where}: models.{model.name}: model_name_or_path")
    checks.check_path_exists(exemplars, f"{grid.where}: methods.{FEW_SHOT}: exemplars")
    models = {"model_name_or_path": pretrained, "mode": FEW_SHOT, "model_label": model.name}
    evaluations = _evaluations(grid, directory, data, FEW_SHOT, models, entry.settings)
    return RunSpec(directory, None, None, evaluations, model.num_ranks)


def _evaluations(
    grid: StudyGrid, run: RunDirectory, data: str, method: str, models: dict[str, Any], own: dict[str, Any]
) -> tuple[EvaluateSettings, ...]:
    """Return the settings of one evaluation per test set (any set but train and validation) and item of `grid.evaluations`.

    `models`: settings of the models. `own`: settings of the method. Raises UserError if two evaluations would have one name.
    """
    evaluations: dict[str, EvaluateSettings] = {}
    for set_name, problems in grid.data[data].items():
        if set_name in (TRAIN, VALIDATION):
            continue
        for variant in grid.evaluations:
            values = {**grid.evaluate, **variant, **own, **models, "shards": problems.shards.output_dir}
            if values.get("mode") == method != FEW_SHOT:
                values["mode"] = "auto"
            if not models.get("planner"):
                values.pop("guidance_from", None)
            elif values.get("guidance_from") == "gold":
                values["planner"] = ""
            where = f"{grid.where}: evaluate: run {run.name}"
            settings = from_dict(EvaluateSettings, {**values, "output_dir": "-"}, where)
            mode = method if settings.mode in ("auto", FEW_SHOT) else settings.mode
            name = _with_options(settings, data, set_name, mode)
            settings = dataclasses.replace(settings, output_dir=str(run.evaluation(name).path))
            if evaluations.setdefault(name, settings) != settings:
                raise UserError(
                    f"{grid.where}: evaluations: two of them would both be {name}; evaluations of one study may differ in "
                    "calculator, guidance_from, mode, temperature and, with a temperature, seed"
                )
    return tuple(evaluations.values())


def _check_files(train: TrainSettings, model: ModelEntry, where: str) -> None:
    path = f"{where}: models.{model.name}"
    for key in ("model_name_or_path", "config_name"):
        checks.check_path_exists(getattr(train, key), f"{path}: {key}")
    if train.config_name.startswith("stories-"):
        checks.check_choice(train.config_name, presets.student_names(), f"{path}: config_name")
    if train.deepspeed and not Path(train.deepspeed).is_file():
        section = f"models.{model.name}" if "deepspeed" in model.settings else "train"
        raise UserError(f"{where}: {section}: deepspeed: there is no file {train.deepspeed}")


def evaluation_variant(settings: EvaluateSettings) -> str:
    """Return the name of an evaluation without the mode: problem set and options, e.g. `gsm8k-test-no_calculator`."""
    return _with_options(settings, Path(settings.shards).name)


def _with_options(settings: EvaluateSettings, *parts: str) -> str:
    guidance = ["gold_guidance"] if settings.guidance_from == "gold" else []
    options = {name: getattr(settings, name) for name in ("calculator", "temperature", "seed")}
    return evaluation_name(*parts, *guidance, **options)
