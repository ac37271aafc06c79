"""Functions that turn parsed YAML or flags into checked settings dataclasses.

Imports only the standard library and trainer.errors, so that `--help` is fast.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from trainer.errors import UserError

Settings = TypeVar("Settings")
_BOOLEAN_WORDS = {"yes": "true", "1": "true", "no": "false", "0": "false"}
_warned: set[str] = set()  # old names that this process has already warned about


def setting(default: Any, help: str, **extra: Any) -> Any:
    """Return a dataclass field. `help`: help text of the flag.

    `extra` may contain constraints for `check_values`: `choices`, `minimum` (a number or the name of another setting),
    `positive=True`, `probability=True`. `positional=True` makes the setting a positional argument on the command line.
    `old_names` lists earlier names of the setting, which are accepted with a warning for one release.
    """
    metadata = {"help": help, **extra}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def from_dict(cls: type[Settings], values: dict[str, Any], where: str) -> Settings:
    """Return settings from a dict of parsed YAML or flags. `where` (e.g. a file name) is the prefix of error messages.

    Raises UserError if a key is unknown, if a value has the wrong type, or if the constructor of `cls` rejects the values. For
    an unknown key, the message suggests the closest known key.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = dict(values)
    rename_old_keys(cls, values, where)
    coerced: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: unknown setting {key!r}{did_you_mean(key, known)}")
        if "true" in known[key].metadata.get("choices", ()):  # a string, but YAML parses true as a bool
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
    """Replace earlier names of settings (`old_names`) among the keys of `values` by the current names, in place.

    `warn` is called with a message, once per old name and process. Use None for files that an earlier release wrote.
    Raises UserError if `values` has both names of a setting.
    """
    renamed = {old: f.name for f in dataclasses.fields(cls) for old in f.metadata.get("old_names", ())}
    for old, new in [(old, new) for old, new in renamed.items() if old in values]:
        if new in values:
            raise UserError(f"{where}: {old} is the earlier name of {new}; give only {new}")
        values[new] = values.pop(old)
        if warn is not None and old not in _warned:
            _warned.add(old)
            warn(f"{where}: {old} is now called {new}; the old name will be removed in the next release")


def check_not_empty(settings: Any, *names: str) -> None:
    for name in names:
        if not getattr(settings, name):
            raise UserError(f"{name} is required")


def check_values(settings: Any) -> None:
    """Raise UserError if a setting violates a constraint of its field."""
    for field in dataclasses.fields(settings):
        name, value, constraints = field.name, getattr(settings, field.name), field.metadata
        choices, minimum = constraints.get("choices"), constraints.get("minimum", -math.inf)
        if choices and value not in choices:
            hint = did_you_mean(value, choices)
            raise UserError(f"{name} is {value!r}; choose one of {', '.join(choices)}{hint}")
        if isinstance(minimum, str):
            minimum = getattr(settings, minimum)
        if "minimum" in constraints and not value >= minimum:  # also catches NaN
            raise UserError(f"{name} is {value}; it must be at least {minimum}")
        if constraints.get("positive") and not 0 < value < math.inf:
            raise UserError(f"{name} is {value}; it must be a positive number")
        if constraints.get("probability") and not 0 < value <= 1:
            raise UserError(f"{name} is {value}; it is a probability above 0 and at most 1")


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest known word, or "" if no word is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Return `value` converted to the type `hint`, or raise UserError. (Flags are strings. YAML parses 5e-4 as a string.)"""
    if typing.get_origin(hint) is list:
        items = value if isinstance(value, list) else [value]
        return [_coerce(item, typing.get_args(hint)[0], where) for item in items]
    if hint is bool:
        word = str(value).lower() if isinstance(value, (bool, str)) else ""
        if (word := _BOOLEAN_WORDS.get(word, word)) in ("true", "false"):
            return word == "true"
    elif hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif hint is int and not isinstance(value, bool):
        try:
            if float(value) == int(float(value)):
                return int(float(value)) if isinstance(value, str) else int(value)
        except (TypeError, ValueError, OverflowError):
            pass
    elif hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{where} is {value!r}, expected {getattr(hint, '__name__', hint)}")
