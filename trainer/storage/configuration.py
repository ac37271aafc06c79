"""Functions that turn parsed YAML or flags into checked settings dataclasses.

Imports only the standard library, so that `--help` is fast.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from trainer.errors import UserError

Settings = TypeVar("Settings")
_BOOLEAN_WORDS = {"yes": "true", "1": "true", "no": "false", "0": "false"}
_warned: set[str] = set()  # old names that were warned about in this process


def setting(default: Any, help: str, **extra: Any) -> Any:
    """Return a dataclass field with its help text; `extra` may hold `choices` and `positional` for the command line.

    `old_names=("x",)`: earlier spellings of a renamed setting. They are accepted for one release, with a warning.
    """
    metadata = {"help": help, **extra}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def from_dict(cls: type[Settings], values: dict[str, Any], where: str) -> Settings:
    """Return settings made from parsed YAML or flags. `where` (e.g. a file name) is the prefix of every error message.

    Raises UserError for an unknown key (suggesting the closest known one) and for a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = dict(values)
    rename_old_keys(cls, values, where)
    coerced: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: unknown setting {key!r}{did_you_mean(key, known)}")
        if "true" in known[key].metadata.get("choices", ()):  # YAML parses true and false as booleans
            word = str(value).lower()
            value = _BOOLEAN_WORDS.get(word, word)
        coerced[key] = _coerce(value, hints[key], f"{where}: {key}")
    try:
        return cls(**coerced)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def rename_old_keys(
    cls: type, values: dict[str, Any], where: str, warn: Callable[[str], object] | None = None
) -> None:
    """Replace earlier spellings among the keys of `values`, in place.

    `warn` is called with a message for the first replacement of each name in a process; None is for files that an
    earlier release wrote. Raises UserError if a setting is given under both names.
    """
    renamed = {old: f.name for f in dataclasses.fields(cls) for old in f.metadata.get("old_names", ())}
    for old, new in [(old, new) for old, new in renamed.items() if old in values]:
        if new in values:
            raise UserError(f"{where}: {old} is the earlier name of {new}; give only {new}")
        values[new] = values.pop(old)
        if warn is not None and old not in _warned:
            _warned.add(old)
            warn(f"{where}: {old} is now called {new}; the old name will be removed in the next release")


def to_dict(settings: Any) -> dict[str, Any]:
    return dataclasses.asdict(settings)


def check_given(settings: Any, *names: str) -> None:
    """Raise UserError if one of the named settings is empty."""
    for name in names:
        if not getattr(settings, name):
            raise UserError(f"{name} is required")


def check_choices(settings: Any) -> None:
    """Raise UserError if a setting is not one of its choices."""
    for field in dataclasses.fields(settings):
        value, choices = getattr(settings, field.name), field.metadata.get("choices")
        if choices and value not in choices:
            raise UserError(
                f"{field.name} is {value!r}; choose one of {', '.join(choices)}{did_you_mean(value, choices)}"
            )


def check_at_least(settings: Any, minimum: float, *names: str) -> None:
    """Raise UserError if one of the named settings is less than `minimum`."""
    for name in names:
        value = getattr(settings, name)
        if not value >= minimum:  # also catches NaN
            raise UserError(f"{name} is {value}; it must be at least {minimum}")


def check_positive(settings: Any, name: str) -> None:
    value = getattr(settings, name)
    if not 0 < value < math.inf:
        raise UserError(f"{name} is {value}; it must be a positive number")


def check_probability(settings: Any, name: str) -> None:
    value = getattr(settings, name)
    if not 0 < value <= 1:
        raise UserError(f"{name} is {value}; it is a probability above 0 and at most 1")


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest known word, "" if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as the type `hint`. Needed as YAML parses 5e-4 as a string and 1 as an int; flags are strings.

    Raises UserError if the value has another type.
    """
    if typing.get_origin(hint) is list:
        items = value if isinstance(value, list) else [value]
        return [_coerce(item, typing.get_args(hint)[0], where) for item in items]
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "yes", "1", "false", "no", "0"):
            return value.lower() in ("true", "yes", "1")
    elif hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif hint is int and not isinstance(value, bool):
        try:
            if float(value) == int(float(value)):
                return int(value) if not isinstance(value, str) else int(float(value))
        except (TypeError, ValueError, OverflowError):
            pass
    elif hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{where} is {value!r}, expected {getattr(hint, '__name__', hint)}")
