"""A study file -> every run it describes, with all settings made and checked before anything is started."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import commit
from trainer.configuration import did_you_mean, from_dict
from trainer.errors import UserError
from trainer.models import sizes
from trainer.run_directory import EvaluationDirectory, RunDirectory, StudyDirectory
from trainer.settings import (
    DATA,
    ConvertSettings,
    EvaluateSettings,
    PrepareSettings,
    TrainSettings,
)

LAUNCHERS = ("auto", "deepspeed", "mpiexec")
# The study decides these; in a study file they would be a second opinion. A set says where `eval_shards` are.
_DECIDED = {
    PrepareSettings: {"output_dir", "overwrite", "inspect", "method"},
    TrainSettings: {
        *("train_shards", "eval_shards", "output_dir", "method", "seed", "model_label"),
        *("resume_from_checkpoint", "overwrite_output_dir"),
    },
    ConvertSettings: {"checkpoint_dir", "output_dir", "overwrite", "dry_run"},
    EvaluateSettings: {"model_name_or_path", "shards", "output_dir", "overwrite", "allow_unfinished"},
}
_KEYS = (
    *("study", "output_dir", "shards_dir", "num_ranks", "launcher"),
    *("data", "models", "methods", "seeds", "prepare", "train", "convert", "evaluate"),
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TRAIN, _VALIDATION = "train", "validation"  # sets with a meaning of their own; every other set is evaluated


@dataclass(frozen=True)
class Run:
    """One student and everything that is done with it. `evaluations` have their own output_dir each."""

    directory: RunDirectory
    train: TrainSettings
    convert: ConvertSettings
    evaluations: tuple[EvaluateSettings, ...]

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def shards(self) -> set[str]:
        """Every shard directory the run reads."""
        return {self.train.train_shards, self.train.eval_shards, *(e.shards for e in self.evaluations)} - {""}


@dataclass(frozen=True)
class Study:
    file: Path
    directory: StudyDirectory
    num_ranks: int
    launcher: str
    shards: tuple[PrepareSettings, ...]
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        return self.directory.path.name


def evaluation_name(settings: EvaluateSettings) -> str:
    return EvaluationDirectory(Path(settings.output_dir)).path.name


def load(
    values: dict[str, Any], file: Path, output_dir: str = "", shards_dir: str = "", num_ranks: int = 0
) -> Study:
    """Make the study from a parsed file; the last three, where given, win over it.

    Raises UserError naming the file and the key path of the first thing that is wrong.
    """
    where = str(file)
    _refuse_unknown(values, _KEYS, where)
    name = _checked_name(_required(values, "study", where), f"{where}: study")
    ranks = num_ranks or values.get("num_ranks", 1)
    if type(ranks) is not int or ranks < 1:
        raise UserError(f"{where}: num_ranks is {ranks!r}; it is the number of processes, at least 1")
    launcher = values.get("launcher", "auto")
    if launcher not in LAUNCHERS:
        raise UserError(f"{where}: launcher is {launcher!r}; choose one of {', '.join(LAUNCHERS)}")
    shards_root = Path(shards_dir or str(values.get("shards_dir", "shards")))
    study_directory = StudyDirectory(Path(output_dir or str(values.get("output_dir", "runs"))) / name)

    data = _data(values, shards_root, where)
    runs = []
    for seed, (data_name, sets), model, method in itertools.product(
        _seeds(values, where),
        data.items(),
        _overrides(_required(values, "models", where), f"{where}: models").items(),
        _overrides(_required(values, "methods", where), f"{where}: methods").items(),
    ):
        runs.append(_run(values, study_directory, data_name, sets, model, method, seed, where))
    shards = tuple(settings for sets in data.values() for settings in sets.values())
    return Study(file, study_directory, ranks, launcher, shards, tuple(runs))


def _run(
    values: dict[str, Any],
    study: StudyDirectory,
    data: str,
    sets: dict[str, PrepareSettings],
    model: tuple[str, dict[str, Any]],
    method: tuple[str, dict[str, Any]],
    seed: int,
    where: str,
) -> Run:
    (model_name, model_values), (method_name, method_values) = model, method
    directory = study.run(f"{data}.{method_name}.{model_name}.s{seed}")
    evaluable = EvaluateSettings.__dataclass_fields__["mode"].metadata["choices"]
    if method_name not in evaluable or method_name == "auto":
        known = [choice for choice in evaluable if choice != "auto"]
        raise UserError(
            f"{where}: methods: {method_name!r} is not a method that can be trained and evaluated alone; "
            f"choose from {', '.join(known)}{did_you_mean(method_name, known)}"
        )
    shared = _section(TrainSettings, values, "train", where)
    _check(TrainSettings, model_values, f"{where}: models.{model_name}")
    _check(TrainSettings, method_values, f"{where}: methods.{method_name}")
    decided = {
        "train_shards": sets[_TRAIN].output_dir,
        "eval_shards": sets[_VALIDATION].output_dir if _VALIDATION in sets else "",
        "output_dir": str(directory.path),
        "method": method_name,
        "model_label": model_name,
        "seed": seed,
    }
    settings = {**shared, **model_values, **method_values, **decided}
    train = from_dict(TrainSettings, settings, f"{where}: run {directory.name}")
    for key in ("model_name_or_path", "config_name"):
        _refuse_missing(getattr(train, key), f"{where}: models.{model_name}: {key}")
    if train.config_name.startswith("stories-") and train.config_name not in sizes.names():
        raise UserError(
            f"{where}: models.{model_name}: config_name: there is no size {train.config_name!r}; "
            f"choose one of {', '.join(sizes.names())}"
        )
    if train.deepspeed and not Path(train.deepspeed).is_file():
        raise UserError(f"{where}: train: deepspeed: there is no file {train.deepspeed}")

    own = {"checkpoint_dir": str(directory.path), "output_dir": str(directory.export), "overwrite": True}
    convert = _section(ConvertSettings, values, "convert", where)
    evaluate = _section(EvaluateSettings, values, "evaluate", where)
    mode = evaluate.get("mode", "auto")
    evaluations = []
    for set_name, shards in sets.items():
        if set_name in (_TRAIN, _VALIDATION):
            continue
        name = f"{data}-{set_name}-{method_name if mode == 'auto' else mode}"
        paths = {"shards": shards.output_dir, "output_dir": str(directory.evaluation(name).path)}
        paths["model_name_or_path"] = str(directory.export)
        evaluations.append(from_dict(EvaluateSettings, {**evaluate, **paths}, f"{where}: evaluate"))
    converted = from_dict(ConvertSettings, {**convert, **own}, f"{where}: convert")
    return Run(directory, train, converted, tuple(evaluations))


def _data(values: dict[str, Any], root: Path, where: str) -> dict[str, dict[str, PrepareSettings]]:
    """data set -> set -> how its shards are made."""
    shared = _section(PrepareSettings, values, "prepare", where)
    found: dict[str, dict[str, PrepareSettings]] = {}
    for name, sets in _mapping(_required(values, "data", where), f"{where}: data").items():
        path = f"{where}: data.{name}"
        if "." in _checked_name(name, path):
            raise UserError(f"{path}: a data set's name has no dot; it is the first part of a run's name")
        found[str(name)] = {}
        for set_name, given in _mapping(sets, path).items():
            set_path = f"{path}.{_checked_name(set_name, path)}"
            given = _mapping(given or {}, set_path)
            _check(PrepareSettings, given, set_path)
            defaults = {"split": str(set_name)} | ({"data": name} if name in DATA else {})
            if not {**defaults, **shared, **given}.keys() >= {"data"}:
                raise UserError(f"{set_path}: data is missing; choose one of {', '.join(DATA)}")
            output_dir = root / f"{name}-{set_name}"
            settings = {**defaults, **shared, **given, "output_dir": str(output_dir)}
            made = from_dict(PrepareSettings, settings, set_path)
            if not commit.is_finished(output_dir):  # finished shards no longer need their source
                _refuse_missing(made.data_path, f"{set_path}: data_path")
                _refuse_missing(made.tokenizer_name, f"{set_path}: tokenizer_name")
            found[str(name)][str(set_name)] = made
        if _TRAIN not in found[str(name)]:
            raise UserError(f"{path}: there is no set named {_TRAIN!r} to learn from")
        if not found[str(name)].keys() - {_TRAIN, _VALIDATION}:
            raise UserError(f"{path}: there is no set to evaluate on; add one, e.g. 'test: {{split: test}}'")
    return found


def _seeds(values: dict[str, Any], where: str) -> list[int]:
    seeds = values.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise UserError(f"{where}: seeds is {seeds!r}, expected a list of numbers, e.g. [0, 1, 2]")
    if len(set(seeds)) != len(seeds):
        raise UserError(f"{where}: seeds: {seeds} names a seed twice")
    return seeds


def _overrides(value: Any, where: str) -> dict[str, dict[str, Any]]:
    """A mapping from name to settings, or a list of names without any."""
    if isinstance(value, list):
        if len({str(name) for name in value}) != len(value):
            raise UserError(f"{where}: {value} names something twice")
        value = {name: {} for name in value}
    if not _mapping(value, where):
        raise UserError(f"{where}: there are none")
    return {
        _checked_name(name, where): _mapping(settings or {}, f"{where}.{name}")
        for name, settings in value.items()
    }


def _section(cls: type, values: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    section = _mapping(values.get(key) or {}, f"{where}: {key}")
    _check(cls, section, f"{where}: {key}")
    return section


def _check(cls: type[Any], values: dict[str, Any], where: str) -> None:
    """Check a part of the settings by itself, so that a wrong value is blamed on the place where it was written."""
    for key in values:
        if key in _DECIDED[cls]:
            raise UserError(f"{where}: {key} is decided by the study; remove it")
    stand_ins = {name: "-" for name in _DECIDED[cls] if cls.__dataclass_fields__[name].default == ""}
    if cls is PrepareSettings:
        stand_ins |= {"data_path": "-", "tokenizer_name": "-"}
    if cls is TrainSettings and not {"model_name_or_path", "config_name"} & values.keys():
        stand_ins["config_name"] = "-"
    from_dict(cls, {**stand_ins, **values}, where)


def _required(values: dict[str, Any], key: str, where: str) -> Any:
    if values.get(key) is None:
        raise UserError(f"{where}: {key} is missing")
    return values[key]


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r}, expected 'key: value' lines")
    return value


def _checked_name(name: Any, where: str) -> str:
    """Names become parts of directory names."""
    if isinstance(name, bool) or not _NAME.fullmatch(str(name)):
        raise UserError(f"{where}: {name!r} is not a name; use letters, digits, '.', '_' and '-'")
    return str(name)


def _refuse_missing(path: str, where: str) -> None:
    """Text that can only be a local path must exist; anything else may be a name on the hub."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    looks_local |= Path(path).suffix in (".json", ".jsonl", ".csv", ".parquet")
    if path and looks_local and not Path(path).exists():
        raise UserError(f"{where}: there is no file or folder {path}")


def _refuse_unknown(values: dict[str, Any], known: Iterable[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}")
