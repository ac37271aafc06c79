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
    prepare = checks.section(PrepareSettings, values, "prepare", where)
    annotate = checks.section(AnnotateSettings, values, "annotate", where)
    found: dict[str, dict[str, ProblemSet]] = {}
    owners: dict[str, str] = {}
    for name, sets in checks.mapping(checks.required(values, "data", where), f"{where}: data").items():
        path = f"{where}: data.{name}"
        if "." in checks.checked_name(name, path):
            raise UserError(f"{path}: a data set's name has no dot; it is the first part of a run's name")
        given_sets = {
            checks.checked_name(key, path): dict(checks.mapping(given or {}, f"{path}.{key}"))
            for key, given in checks.mapping(sets, path).items()
        }
        prepared = {}
        for key, given in given_sets.items():
            own = {setting: value for setting, value in given.items() if setting != "annotate"}
            folder = shards_root / f"{name}-{key}"
            prepared[key] = _prepare(prepare, own, str(name), key, folder, f"{path}.{key}")
            owner = owners.setdefault(str(folder), f"data.{name}.{key}")
            if owner != f"data.{name}.{key}":  # set `c` of `a-b` and set `b-c` of `a`
                raise UserError(f"{where}: {owner} and data.{name}.{key} would both be {folder}; rename one")
        found[str(name)] = {key: ProblemSet(settings) for key, settings in prepared.items()}
        for key, given in given_sets.items():
            if "annotate" in given:
                own, folder = given["annotate"], annotations_root / f"{name}-{key}"
                found[str(name)][key] = _annotated_set(
                    prepared, key, annotate, own, folder, f"{path}.{key}.annotate"
                )
        if TRAIN not in given_sets:
            raise UserError(f"{path}: there is no set named {TRAIN!r} to learn from")
        if not given_sets.keys() - {TRAIN, VALIDATION}:
            raise UserError(f"{path}: there is no set to evaluate on; add one, e.g. 'test: {{split: test}}'")
    return found


def _prepare(
    shared: dict[str, Any], own: dict[str, Any], data: str, name: str, folder: Path, path: str
) -> PrepareSettings:
    """Return the shard settings of a set, without annotation."""
    checks.check_settings(PrepareSettings, own, path)
    values = {"split": name, **({"data": data} if data in DATA else {}), **shared, **own}
    if "data" not in values:
        raise UserError(f"{path}: data is missing; choose one of {', '.join(DATA)}")
    settings = from_dict(PrepareSettings, {**values, "output_dir": str(folder)}, path)
    if not atomic_dir.is_complete(folder):  # finished shards do not need their source
        checks.check_path_exists(settings.data_path, f"{path}: data_path")
        checks.check_path_exists(settings.tokenizer_name, f"{path}: tokenizer_name")
    return settings


def _annotated_set(
    prepared: dict[str, PrepareSettings],
    name: str,
    shared: dict[str, Any],
    given: Any,
    folder: Path,
    path: str,
) -> ProblemSet:
    """Return a set whose shards are made from the output of a teacher, which reads the set's source."""
    source, own = prepared[name], checks.mapping(given or {}, path)
    checks.check_settings(AnnotateSettings, own, path)
    # Annotation must leave out training problems that are also in an evaluated set.
    tests = [other for key, other in prepared.items() if key not in (TRAIN, VALIDATION, name)]
    settings = {
        "with_facts": source.with_facts,
        "max_problems": source.max_problems,
        "decontaminate": [f"{test.data}:{test.data_path}:{test.split}" for test in tests],
        **shared,
        **own,
        **{key: getattr(source, key) for key in ("data", "data_path", "split", "seed")},
        "output_dir": str(folder),
    }
    annotate = from_dict(AnnotateSettings, settings, path)
    annotated = AnnotationDirectory(folder).result / "annotated.jsonl"
    changes = {"data": "jsonl", "data_path": str(annotated), "split": "train", "max_problems": 0}
    return ProblemSet(PrepareSettings(**{**vars(source), **changes}), annotate)
