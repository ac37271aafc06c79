"""Read the `data` section of a study file: data sets, each with several problem sets (train, validation, test, ...)."""

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

TRAIN, VALIDATION = "train", "validation"  # models are evaluated on all other problem sets


@dataclass(frozen=True)
class ProblemSet:
    """Settings that prepare the shards of a problem set. If `annotate` is set, a teacher first writes the solution steps."""

    shards: PrepareSettings
    annotate: AnnotateSettings | None = None


def read_data_sets(
    values: dict[str, Any], shards_root: Path, annotations_root: Path, where: str
) -> dict[str, dict[str, ProblemSet]]:
    """Return {data set: {name of the problem set: problem set}}. Raises UserError, with the key path, if a value is invalid."""
    prepare = checks.section(PrepareSettings, values, "prepare", where)
    annotate = checks.section(AnnotateSettings, values, "annotate", where)
    data_sets: dict[str, dict[str, ProblemSet]] = {}
    owners: dict[str, str] = {}  # shard directory -> key path of its problem set
    for name, sets in checks.mapping(checks.required(values, "data", where), f"{where}: data").items():
        path = f"{where}: data.{name}"
        if "." in checks.checked_name(name, path):
            raise UserError(f"{path}: a data set's name has no dot; it is the first part of a run's name")
        own_settings, prepared = checks.named_mappings(sets, path), {}
        for key, values_of_set in own_settings.items():
            own = {setting: value for setting, value in values_of_set.items() if setting != "annotate"}
            folder = shards_root / f"{name}-{key}"
            prepared[key] = _prepare(prepare, own, str(name), key, folder, f"{path}.{key}")
            owner = owners.setdefault(str(folder), f"data.{name}.{key}")
            if owner != f"data.{name}.{key}":  # e.g. set `c` of `a-b` and set `b-c` of `a`: both in `a-b-c`
                raise UserError(f"{where}: {owner} and data.{name}.{key} would both be {folder}; rename one")
        problem_sets = {key: ProblemSet(settings) for key, settings in prepared.items()}
        for key, own in own_settings.items():
            if "annotate" in own:
                folder, set_path = annotations_root / f"{name}-{key}", f"{path}.{key}.annotate"
                problem_sets[key] = _annotated_set(prepared, key, annotate, own["annotate"], folder, set_path)
        if TRAIN not in problem_sets:
            raise UserError(f"{path}: there is no set named {TRAIN!r} to learn from")
        if not problem_sets.keys() - {TRAIN, VALIDATION}:
            raise UserError(f"{path}: there is no set to evaluate on; add one, e.g. 'test: {{split: test}}'")
        data_sets[str(name)] = problem_sets
    return data_sets


def _prepare(
    shared: dict[str, Any], own: dict[str, Any], data: str, name: str, folder: Path, path: str
) -> PrepareSettings:
    """Return the shard settings of a problem set. Keys of `own` override keys of `shared`."""
    checks.check_settings(PrepareSettings, own, path)
    values = {"split": name, **({"data": data} if data in DATA else {}), **shared, **own}
    if "data" not in values:
        raise UserError(f"{path}: data is missing; choose one of {', '.join(DATA)}")
    settings = from_dict(PrepareSettings, {**values, "output_dir": str(folder)}, path)
    if not atomic_dir.is_complete(folder):  # once the shards exist, source and tokenizer are not needed
        checks.check_path_exists(settings.data_path, f"{path}: data_path")
        checks.check_path_exists(settings.tokenizer_name, f"{path}: tokenizer_name")
    return settings


def _annotated_set(
    sets: dict[str, PrepareSettings], name: str, shared: dict[str, Any], section: Any, folder: Path, path: str
) -> ProblemSet:
    """Return a problem set that a teacher annotates. The annotations are written to `folder`; the shards are made from them."""
    source, own = sets[name], checks.mapping(section or {}, path)
    checks.check_settings(AnnotateSettings, own, path)
    # A teacher must not annotate problems that are also in an evaluated set.
    tests = [shards for key, shards in sets.items() if key not in (TRAIN, VALIDATION, name)]
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
