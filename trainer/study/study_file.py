"""Load a study file: make and check the settings of all its runs before any stage starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.settings import ConvertSettings, EvaluateSettings, PrepareSettings, TrainSettings
from trainer.storage.run_directory import StudyDirectory
from trainer.study import checks, data_sets, methods
from trainer.study.data_sets import ProblemSet
from trainer.study.expand import ModelEntry, RunSpec, StudyGrid, expand

LAUNCHERS = ("auto", "deepspeed", "mpiexec")
STUDY_KEYS = (
    *("study", "output_dir", "shards_dir", "annotations_dir", "num_ranks", "num_parallel", "launcher"),
    *("data", "models", "methods", "seeds"),
    *("annotate", "prepare", "train", "convert", "evaluate", "evaluations"),
)


@dataclass(frozen=True)
class Study:
    file: Path
    directory: StudyDirectory
    num_ranks: int
    num_parallel: int  # maximum number of stages that run at the same time on this machine
    launcher: str
    problem_sets: tuple[ProblemSet, ...]
    runs: tuple[RunSpec, ...]

    @property
    def name(self) -> str:
        return self.directory.path.name

    @property
    def prepare_settings(self) -> tuple[PrepareSettings, ...]:
        return tuple(problems.shards for problems in self.problem_sets)


def load_study(
    values: dict[str, Any],
    file: Path,
    output_dir: str = "",
    shards_dir: str = "",
    num_ranks: int = 0,
    num_parallel: int = 0,
) -> Study:
    """Return the study that the parsed content `values` of `file` describes. Raises UserError if a value is invalid.

    An optional argument that is not "" or 0 replaces the file's value (`num_ranks`: also the values of single models).
    """
    where = str(file)
    checks.check_keys(values, STUDY_KEYS, where)
    name = checks.checked_name(checks.required(values, "study", where), f"{where}: study")
    launcher = values.get("launcher", "auto")
    if launcher not in LAUNCHERS:
        raise UserError(f"{where}: launcher is {launcher!r}; choose one of {', '.join(LAUNCHERS)}")
    default_ranks = checks.checked_count(num_ranks or values.get("num_ranks", 1), f"{where}: num_ranks")
    num_parallel = num_parallel or values.get("num_parallel", 1)
    checks.checked_count(num_parallel, f"{where}: num_parallel", "stages at the same time")
    directory = StudyDirectory(Path(output_dir or str(values.get("output_dir", "runs"))) / name)
    shards_root = Path(shards_dir or str(values.get("shards_dir", "shards")))
    annotations_root = Path(str(values.get("annotations_dir", "annotations")))
    variants = values.get("evaluations", [{}])
    if not isinstance(variants, list) or not variants:
        raise UserError(
            f"{where}: evaluations is {variants!r}, expected a list, e.g. [{{calculator: true}}, {{calculator: false}}]"
        )

    data = data_sets.read_data_sets(values, shards_root, annotations_root, where)
    seeds = _seeds(values.get("seeds", [0]), f"{where}: seeds")
    models = _models(values, num_ranks, default_ranks, seeds, where)
    grid = StudyGrid(
        where=where,
        directory=directory,
        data=data,
        models=models,
        methods=methods.read_methods(values, models, data, where),
        train=checks.section(TrainSettings, values, "train", where),
        convert=checks.section(ConvertSettings, values, "convert", where),
        evaluate=_evaluation(values.get("evaluate"), f"{where}: evaluate"),
        evaluations=[
            _evaluation(variant, f"{where}: evaluations[{number}]") for number, variant in enumerate(variants)
        ],
    )
    problem_sets = tuple(problems for sets in data.values() for problems in sets.values())
    runs = expand(grid)
    if not runs:
        raise UserError(f"{where}: there is no run: no method is for any of the models and data sets")
    return Study(file, directory, default_ranks, num_parallel, launcher, problem_sets, runs)


def _models(
    values: dict[str, Any], num_ranks: int, default_ranks: int, default_seeds: list[int], where: str
) -> dict[str, ModelEntry]:
    models = {}
    for name, settings in checks.named_settings(values, "models", where).items():
        path = f"{where}: models.{name}"
        ranks = checks.checked_count(settings.pop("num_ranks", default_ranks), f"{path}: num_ranks")
        seeds = _seeds(settings.pop("seeds", default_seeds), f"{path}: seeds")
        checks.check_settings(TrainSettings, settings, path)
        models[name] = ModelEntry(name, settings, num_ranks or ranks, tuple(seeds))
    return models


def _evaluation(section: Any, where: str) -> dict[str, Any]:
    values = checks.mapping(section or {}, where)
    if values.get("mode") == methods.FEW_SHOT or "exemplars" in values:
        raise UserError(f"{where}: few_shot is a method; write it, with its exemplars, under methods")
    checks.check_settings(EvaluateSettings, values, where)
    return values


def _seeds(seeds: Any, where: str) -> list[int]:
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise UserError(f"{where} is {seeds!r}, expected a list of numbers, e.g. [0, 1, 2]")
    if len(set(seeds)) != len(seeds):
        raise UserError(f"{where}: {seeds} names a seed twice")
    return seeds
