"""The runs of a study: every student that is trained, and every evaluation of several students together."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.models import presets
from trainer.settings import ConvertSettings, EvaluateSettings, TrainSettings
from trainer.storage.configuration import from_dict
from trainer.storage.run_directory import EvaluationDirectory, RunDirectory, StudyDirectory, evaluation_name
from trainer.study import checks
from trainer.study.data_sets import TRAIN, VALIDATION, ProblemSet
from trainer.study.methods import ALONE, FEW_SHOT, SOLVER, MethodEntry, trained_alone


@dataclass(frozen=True)
class RunSpec:
    """One run directory and what is done in it. `evaluations` have their own output_dir each.

    A student is trained and converted, and evaluated unless it is a part of a pair. Other runs train nothing: they
    evaluate `students`, the names of other runs, or a pretrained model as it is.
    """

    directory: RunDirectory
    train: TrainSettings | None
    convert: ConvertSettings | None
    evaluations: tuple[EvaluateSettings, ...]
    num_ranks: int = 1
    students: tuple[str, ...] = ()
    serves: tuple[EvaluateSettings, ...] = ()  # evaluations of other runs that need this run's export

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def shards(self) -> set[str]:
        """Every shard directory the run reads."""
        learned = {self.train.train_shards, self.train.eval_shards} if self.train else set()
        return {*learned, *(e.shards for e in self.evaluations)} - {""}


@dataclass(frozen=True)
class ModelSpec:
    """An entry under `models`."""

    name: str
    settings: dict[str, Any]  # of its training
    num_ranks: int


@dataclass(frozen=True)
class StudyGrid:
    """A study file, read: what `make` multiplies out."""

    where: str
    directory: StudyDirectory
    seeds: list[int]
    data: dict[str, dict[str, ProblemSet]]
    models: dict[str, ModelSpec]
    methods: dict[str, MethodEntry]
    train: dict[str, Any]
    convert: dict[str, Any]
    evaluate: dict[str, Any]
    evaluations: list[dict[str, Any]]  # each adds to `evaluate`


def expand(grid: StudyGrid) -> tuple[RunSpec, ...]:
    """All runs, each after the runs whose students it asks. Raises UserError for settings that do not fit together."""
    runs: dict[str, RunSpec] = {}
    alone = trained_alone(grid.methods)
    for seed, data, model, entry in itertools.product(
        grid.seeds, grid.data, grid.models.values(), grid.methods.values()
    ):
        if model.name not in entry.models or data not in entry.data:
            continue
        made: list[RunSpec] = []
        if entry.pair:
            made = _together(grid, entry, data, model, seed)
        elif entry.name in alone:
            made = [_student(grid, entry.name, data, model, seed)]
        elif (
            entry.name == FEW_SHOT and seed == grid.seeds[0]
        ):  # nothing is drawn: other seeds would be copies
            made = [_few_shot(grid, entry, data, model, seed)]
        for run in made:
            runs.setdefault(run.name, run)
    serves: dict[str, tuple[EvaluateSettings, ...]] = {}
    for run in runs.values():
        for name in run.students:
            serves[name] = serves.get(name, ()) + run.evaluations
    return tuple(dataclasses.replace(run, serves=serves.get(run.name, ())) for run in runs.values())


def _student(grid: StudyGrid, method: str, data: str, model: ModelSpec, seed: int) -> RunSpec:
    directory = grid.directory.run(f"{data}.{method}.{model.name}.s{seed}")
    own = grid.methods[method].settings if method in grid.methods else {}
    sets = grid.data[data]
    decided = {
        "train_shards": sets[TRAIN].shards.output_dir,
        "eval_shards": sets[VALIDATION].shards.output_dir if VALIDATION in sets else "",
        "output_dir": str(directory.path),
        "method": method,
        "model_label": model.name,
        "seed": seed,
    }
    values = {**grid.train, **model.settings, **own, **decided}
    train = from_dict(TrainSettings, values, f"{grid.where}: run {directory.name}")
    _check_files(train, model, grid.where)
    paths = {"checkpoint_dir": str(directory.path), "output_dir": str(directory.export), "overwrite": True}
    convert = from_dict(ConvertSettings, {**grid.convert, **paths}, f"{grid.where}: convert")
    evaluations: tuple[EvaluateSettings, ...] = ()
    if method in ALONE:
        student = {"model_name_or_path": str(directory.export)}
        evaluations = _evaluations(grid, directory, data, method, student, {})
    return RunSpec(directory, train, convert, evaluations, model.num_ranks)


def _together(grid: StudyGrid, entry: MethodEntry, data: str, model: ModelSpec, seed: int) -> list[RunSpec]:
    """A composite's run, after the students it asks."""
    assert entry.pair
    other = grid.models[entry.decomposer_model or model.name]
    students = {
        part: _student(grid, part, data, model if part == SOLVER else other, seed) for part in entry.parts
    }
    exports = {part: str(student.directory.export) for part, student in students.items()}
    label = model.name if other == model else f"{other.name}+{model.name}"
    directory = grid.directory.run(f"{data}.{entry.name}.{label}.s{seed}")
    asked = {
        "solver": exports[SOLVER],
        "decomposer": exports.get(entry.pair.decomposer, ""),
        "planner": exports.get(entry.pair.planner, ""),
        "subquestions": "decomposer" if entry.pair.decomposer else "gold",
        "mode": "auto",
    }
    evaluations = _evaluations(grid, directory, data, entry.name, asked, entry.settings)
    if not any(settings.planner for settings in evaluations):  # the plans are the gold ones
        students.pop(entry.pair.planner, None)
    names = tuple(student.name for student in students.values())
    return [*students.values(), RunSpec(directory, None, None, evaluations, model.num_ranks, names)]


def _few_shot(grid: StudyGrid, entry: MethodEntry, data: str, model: ModelSpec, seed: int) -> RunSpec:
    directory = grid.directory.run(f"{data}.{FEW_SHOT}.{model.name}.s{seed}")
    pretrained = {**grid.train, **model.settings}.get("model_name_or_path", "")
    if not pretrained:
        raise UserError(
            f"{grid.where}: methods.{FEW_SHOT}: model {model.name} has random weights; only a pretrained one "
            "(model_name_or_path) can be asked as it is: name such models with 'models: [...]'"
        )
    checks.refuse_missing(pretrained, f"{grid.where}: models.{model.name}: model_name_or_path")
    checks.refuse_missing(entry.settings.get("exemplars", ""), f"{grid.where}: methods.{FEW_SHOT}: exemplars")
    asked = {"model_name_or_path": pretrained, "mode": FEW_SHOT, "model_label": model.name}
    evaluations = _evaluations(grid, directory, data, FEW_SHOT, asked, entry.settings)
    return RunSpec(directory, None, None, evaluations, model.num_ranks)


def _evaluations(
    grid: StudyGrid, run: RunDirectory, data: str, method: str, asked: dict[str, Any], own: dict[str, Any]
) -> tuple[EvaluateSettings, ...]:
    """Every set that is not learned from, in every way the file asks for."""
    found: dict[str, EvaluateSettings] = {}
    for set_name, problems in grid.data[data].items():
        if set_name in (TRAIN, VALIDATION):
            continue
        for variant in grid.evaluations:
            values = {**grid.evaluate, **variant, **own, **asked, "shards": problems.shards.output_dir}
            if values.get("mode") == method != FEW_SHOT:
                values["mode"] = "auto"
            if not asked.get("planner"):
                values.pop("guidance_from", None)
            elif values.get("guidance_from") == "gold":
                values["planner"] = ""
            where = f"{grid.where}: evaluate: run {run.name}"
            made = from_dict(EvaluateSettings, {**values, "output_dir": "-"}, where)
            mode = method if made.mode in ("auto", FEW_SHOT) else made.mode
            name = evaluation_name(data, set_name, mode, *_guidance(made), **_ways(made))
            made = dataclasses.replace(made, output_dir=str(run.evaluation(name).path))
            if found.setdefault(name, made) != made:
                raise UserError(
                    f"{grid.where}: evaluations: two of them would both be {name}; those of one study may differ in "
                    "calculator, guidance_from, mode, temperature and, with a temperature, seed"
                )
    return tuple(found.values())


def _check_files(train: TrainSettings, model: ModelSpec, where: str) -> None:
    for key in ("model_name_or_path", "config_name"):
        checks.refuse_missing(getattr(train, key), f"{where}: models.{model.name}: {key}")
    if train.config_name.startswith("stories-"):
        checks.one_of(
            train.config_name, presets.student_names(), f"{where}: models.{model.name}: config_name"
        )
    if train.deepspeed and not Path(train.deepspeed).is_file():
        place = f"models.{model.name}" if "deepspeed" in model.settings else "train"
        raise UserError(f"{where}: {place}: deepspeed: there is no file {train.deepspeed}")


def evaluation_name_of(settings: EvaluateSettings) -> str:
    """The evaluation's name in its run."""
    return EvaluationDirectory(Path(settings.output_dir)).path.name


def evaluation_directory_of(settings: EvaluateSettings) -> str:
    """What is evaluated on and how, without who: `gsm8k-test-no_calculator`."""
    return evaluation_name(Path(settings.shards).name, *_guidance(settings), **_ways(settings))


def _guidance(settings: EvaluateSettings) -> list[str]:
    return ["gold_guidance"] if settings.guidance_from == "gold" else []


def _ways(settings: EvaluateSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("calculator", "temperature", "seed")}
