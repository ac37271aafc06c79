"""How settings are read: from parsed YAML or flags into checked dataclasses, every wrong key and value named.

Nothing is imported here but the standard library, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import field
from typing import Any, TypeVar

from trainer.errors import UserError

Settings = TypeVar("Settings")


def setting(default: Any, help: str, **extra: Any) -> Any:
    """A field with its help text; `extra` may hold `choices` and `positional` for the command line."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **extra})
    return field(default=default, metadata={"help": help, **extra})


def from_dict(cls: type[Settings], values: dict[str, Any], where: str) -> Settings:
    """Make settings from parsed YAML or flags. `where` (a file name) begins every message.

    Raises UserError for an unknown key (with the nearest known one) and for a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    coerced: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: unknown setting {key!r}{did_you_mean(key, known)}")
        if isinstance(value, bool) and "true" in known[key].metadata.get("choices", ()):
            value = str(value).lower()  # YAML reads the words true and false as booleans
        coerced[key] = _coerce(value, hints[key], f"{where}: {key}")
    try:
        return cls(**coerced)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def to_dict(settings: Any) -> dict[str, Any]:
    return dataclasses.asdict(settings)


def check_given(name: str, value: str) -> None:
    if not value:
        raise UserError(f"{name} is required")


def check_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(
            f"{name} is {value!r}; choose one of {', '.join(choices)}{did_you_mean(value, choices)}"
        )


def check_at_least(name: str, value: float, least: float) -> None:
    if not value >= least:  # also catches NaN
        raise UserError(f"{name} is {value}; it must be at least {least}")


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """YAML reads 5e-4 as a string and 1 as an int; a flag is always a string. Turn both into the field's type."""
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
