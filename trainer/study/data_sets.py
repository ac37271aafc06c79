"""The `data` section of a study file: data sets, their problem sets, and the settings of their shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.settings import DATA, PrepareSettings
from trainer.storage import atomic_dir
from trainer.storage.configuration import from_dict
from trainer.storage.run_directory import AnnotationDirectory
from trainer.study import checks
from trainer.teacher.settings import AnnotateSettings

TRAIN, VALIDATION = "train", "validation"  # every other set is evaluated


@dataclass(frozen=True)
class ProblemSet:
    """One problem set. With `annotate`, a teacher writes its solution steps first."""

    shards: PrepareSettings
    annotate: AnnotateSettings | None = None


def read_data_sets(
    values: dict[str, Any], shards_root: Path, annotations_root: Path, where: str
) -> dict[str, dict[str, ProblemSet]]:
    """Return data set -> set name -> problem set. Raises UserError with the key path of the fault."""
    found: dict[str, dict[str, ProblemSet]] = {}
    for name, sets in checks.mapping(checks.required(values, "data", where), f"{where}: data").items():
        path = f"{where}: data.{name}"
        if "." in checks.checked_name(name, path):
            raise UserError(f"{path}: a data set's name has no dot; it is the first part of a run's name")
        given_sets = {
            checks.checked_name(key, path): dict(checks.mapping(given or {}, f"{path}.{key}"))
            for key, given in checks.mapping(sets, path).items()
        }
        prepared = {
            key: _prepare(values, str(name), key, given, shards_root, where)
            for key, given in given_sets.items()
        }
        found[str(name)] = {
            key: _problem_set(values, prepared, key, given, annotations_root / f"{name}-{key}", where, path)
            for key, given in given_sets.items()
        }
        if TRAIN not in given_sets:
            raise UserError(f"{path}: there is no set named {TRAIN!r} to learn from")
        if not given_sets.keys() - {TRAIN, VALIDATION}:
            raise UserError(f"{path}: there is no set to evaluate on; add one, e.g. 'test: {{split: test}}'")
    _check_distinct_folders(found, where)
    return found


def _prepare(
    values: dict[str, Any], data: str, name: str, given: dict[str, Any], root: Path, where: str
) -> PrepareSettings:
    """Return the shard settings of a set, without annotation."""
    path = f"{where}: data.{data}.{name}"
    shared = checks.section(PrepareSettings, values, "prepare", where)
    own = {key: value for key, value in given.items() if key != "annotate"}
    checks.check_settings(PrepareSettings, own, path)
    defaults = {"split": name} | ({"data": data} if data in DATA else {})
    if "data" not in {**defaults, **shared, **own}:
        raise UserError(f"{path}: data is missing; choose one of {', '.join(DATA)}")
    output_dir = root / f"{data}-{name}"
    settings = from_dict(PrepareSettings, {**defaults, **shared, **own, "output_dir": str(output_dir)}, path)
    if not atomic_dir.is_complete(output_dir):  # finished shards do not need their source
        checks.check_path_exists(settings.data_path, f"{path}: data_path")
        checks.check_path_exists(settings.tokenizer_name, f"{path}: tokenizer_name")
    return settings


def _problem_set(
    values: dict[str, Any],
    prepared: dict[str, PrepareSettings],
    name: str,
    given: dict[str, Any],
    folder: Path,
    where: str,
    path: str,
) -> ProblemSet:
    """Return the set; with `annotate`, the teacher reads the source, and the shards are made from its output."""
    shared = checks.section(AnnotateSettings, values, "annotate", where)
    source = prepared[name]
    if "annotate" not in given:
        return ProblemSet(source)
    own_path = f"{path}.{name}.annotate"
    own = checks.mapping(given["annotate"] or {}, own_path)
    checks.check_settings(AnnotateSettings, own, own_path)
    # Annotation must leave out training problems that are also in an evaluated set.
    tests = [other for key, other in prepared.items() if key not in (TRAIN, VALIDATION, name)]
    fixed = {
        "data": source.data,
        "data_path": source.data_path,
        "split": source.split,
        "seed": source.seed,
        "output_dir": str(folder),
    }
    settings = {
        "with_facts": source.with_facts,
        "max_problems": source.max_problems,
        "decontaminate": [f"{test.data}:{test.data_path}:{test.split}" for test in tests],
        **shared,
        **own,
        **fixed,
    }
    annotate = from_dict(AnnotateSettings, settings, own_path)
    annotated = AnnotationDirectory(folder).result / "annotated.jsonl"
    changes = {"data": "jsonl", "data_path": str(annotated), "split": "train", "max_problems": 0}
    return ProblemSet(PrepareSettings(**{**vars(source), **changes}), annotate)


def _check_distinct_folders(found: dict[str, dict[str, ProblemSet]], where: str) -> None:
    """Raise UserError if two sets share a folder, as set `c` of `a-b` and set `b-c` of `a` do."""
    owners: dict[str, str] = {}
    for data, sets in found.items():
        for name, problems in sets.items():
            path, folder = f"data.{data}.{name}", problems.shards.output_dir
            if folder in owners:
                raise UserError(f"{where}: {owners[folder]} and {path} would both be {folder}; rename one")
            owners[folder] = path
