"""Checks of the sections of a study file. Error messages contain the key path of the fault."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.runtime import terminal
from trainer.settings import ConvertSettings, EvaluateSettings, PrepareSettings, TrainSettings
from trainer.storage.configuration import did_you_mean, from_dict, rename_old_keys
from trainer.teacher.settings import AnnotateSettings

# Settings class -> names of the settings that the study computes. The file's sections of this class must not contain them.
SET_BY_STUDY: dict[type[Any], set[str]] = {
    AnnotateSettings: {"data", "data_path", "split", "seed", "output_dir", "overwrite", "dry_run"},
    PrepareSettings: {"output_dir", "overwrite", "inspect", "method"},
    TrainSettings: {
        *("train_shards", "eval_shards", "output_dir", "method", "seed", "model_label"),
        *("resume_from_checkpoint", "overwrite_output_dir", "dry_run"),
    },
    ConvertSettings: {"checkpoint_dir", "output_dir", "overwrite", "dry_run"},
    EvaluateSettings: {
        *("model_name_or_path", "decomposer", "solver", "planner", "subquestions"),
        *("shards", "output_dir", "overwrite", "allow_unfinished", "model_label"),
    },
}
# Placeholders for required settings that come from other sections, so that a section can be checked alone.
_PLACEHOLDERS: dict[type[Any], dict[str, Any]] = {
    AnnotateSettings: {"data_path": "-", "output_dir": "-"},
    PrepareSettings: {"output_dir": "-", "data_path": "-", "tokenizer_name": "-"},
    TrainSettings: {"train_shards": "-", "eval_shards": "-", "output_dir": "-"},
    ConvertSettings: {"checkpoint_dir": "-"},
    EvaluateSettings: {"model_name_or_path": "-", "shards": "-"},
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LOCAL_FILES = (".json", ".jsonl", ".csv", ".parquet")


def check_settings(cls: type[Any], values: dict[str, Any], where: str) -> None:
    """Raise UserError if `values` are not valid settings of `cls`, or if the study computes one of them.

    Replaces old names of settings in `values`, so that merged sections do not contain a setting under two names.
    """
    rename_old_keys(cls, values, where, terminal.deprecation)
    for key in values:
        if key in SET_BY_STUDY[cls]:
            raise UserError(f"{where}: {key} is decided by the study; remove it")
    placeholders = dict(_PLACEHOLDERS[cls])
    if cls is TrainSettings and not {"model_name_or_path", "config_name"} & values.keys():
        placeholders["config_name"] = "-"
    if cls is AnnotateSettings:
        if not {"base_url", "model", "model_name_or_path"} & values.keys():
            placeholders["model_name_or_path"] = "-"
        elif {"base_url", "model"} & values.keys():
            placeholders |= {"base_url": "-", "model": "-"}
    from_dict(cls, {**placeholders, **values}, where)


def section(cls: type[Any], values: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return the checked settings under `key` of the study file; {} if the key is missing."""
    settings = mapping(values.get(key) or {}, f"{where}: {key}")
    check_settings(cls, settings, f"{where}: {key}")
    return settings


def required(values: dict[str, Any], key: str, where: str) -> Any:
    if values.get(key) is None:
        raise UserError(f"{where}: {key} is missing")
    return values[key]


def mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r}, expected 'key: value' lines")
    return value


def named_settings(values: dict[str, Any], section: str, where: str) -> dict[str, dict[str, Any]]:
    """Return {name: settings} of a required section. The section is a mapping, or a list of names without settings."""
    value, where = required(values, section, where), f"{where}: {section}"
    if isinstance(value, list):
        if len({str(key) for key in value}) != len(value):
            raise UserError(f"{where}: {value} names something twice")
        value = {str(key): {} for key in value}
    if not mapping(value, where):
        raise UserError(f"{where}: there are none")
    return named_mappings(value, where)


def named_mappings(value: Any, where: str) -> dict[str, dict[Any, Any]]:
    """Return a checked copy of a mapping from names to mappings. In the copy, null is replaced by an empty mapping."""
    return {
        checked_name(key, where): dict(mapping(settings or {}, f"{where}.{key}"))
        for key, settings in mapping(value, where).items()
    }


def select_names(value: Any, known: Iterable[str], where: str) -> tuple[str, ...]:
    """Return the names in `value`, or all `known` names if `value` is None. Raises UserError if a name is not known."""
    known = tuple(known)
    if value is None:
        return known
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is {value!r}, expected a list of names, e.g. [{known[0]}]")
    for item in value:
        check_choice(str(item), known, where)
    return tuple(map(str, value))


def check_choice(value: str, known: Iterable[str], where: str) -> None:
    known = list(known)
    if value not in known:
        hint = did_you_mean(value, known)
        raise UserError(f"{where}: there is no {value!r}; choose from {', '.join(known)}{hint}")


def checked_name(value: Any, where: str) -> str:
    """Return `str(value)`. Raises UserError if the string is not safe as a part of a directory name."""
    if isinstance(value, bool) or not _NAME.fullmatch(str(value)):
        raise UserError(f"{where}: {value!r} is not a name; use letters, digits, '.', '_' and '-'")
    return str(value)


def checked_count(value: Any, where: str, counted: str = "processes") -> int:
    if type(value) is not int or value < 1:
        raise UserError(f"{where} is {value!r}; it is the number of {counted}, at least 1")
    return value


def check_keys(values: dict[str, Any], known: Iterable[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}")


def check_path_exists(path: str, where: str) -> None:
    """Raise UserError if `path` is clearly a local path (not a Hub name) and does not exist."""
    is_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix in _LOCAL_FILES
    if is_local and not Path(path).exists():
        raise UserError(f"{where}: there is no file or folder {path}")
