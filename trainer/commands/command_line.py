"""Flags for a settings dataclass: what every command's `--help` shows and how its values are read."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from pathlib import Path
from typing import Any, TypeVar

from trainer.errors import UserError
from trainer.runtime import terminal
from trainer.storage.configuration import from_dict, rename_old_keys

Settings = TypeVar("Settings")


def parse(cls: type[Settings], description: str, arguments: list[str] | None = None) -> Settings:
    """Read flags and, below them, `--config file.yaml`: a flag wins over the file, the file over the default.

    `--local_rank N`, which DeepSpeed's launcher adds, is accepted and ignored (the environment has it too). On a
    wrong value prints one message and exits with status 2.
    """
    parser = _parser(cls, description)
    flags = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    flags.pop("local_rank", None)
    config = flags.pop("config", None)
    try:
        values = read_yaml(Path(config)) if config else {}
        # Before they are merged: a flag must win over the file under either name.
        rename_old_keys(cls, values, str(config), terminal.deprecation)
        rename_old_keys(cls, flags, "flags", terminal.deprecation)
        where = f"{config} and flags" if config else "flags"
        return from_dict(cls, {**values, **flags}, where)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises UserError naming file and line."""
    import yaml  # here: without --config it is not needed, and importing it takes time

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found a {type(values).__name__}")
    return values


def new_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser without flags that shows the description as it is written."""
    return argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _parser(cls: type, description: str) -> argparse.ArgumentParser:
    parser = new_parser(description)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with any of these settings; flags win over it"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        for name in (field.name, *field.metadata.get("old_names", ())):
            _add(parser, field, hints[field.name], name)
    return parser


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any, name: str) -> None:
    """Add the flag of a setting; under an earlier spelling it is accepted but not shown by `--help`."""
    default = field.default if field.default is not dataclasses.MISSING else ""
    text = field.metadata["help"].replace("%", "%%")
    if default != "":
        text += f" [{str(default).lower() if isinstance(default, bool) else default}]"
    if name != field.name:
        text = argparse.SUPPRESS
    choices = field.metadata.get("choices")
    is_list = typing.get_origin(hint) is list
    if field.metadata.get("positional"):
        parser.add_argument(field.name, nargs="*" if is_list else "?", help=text, metavar=field.name.upper())
    elif hint is bool:
        parser.add_argument(f"--{name}", nargs="?", const="true", metavar="BOOL", help=text)
    else:
        metavar = "{" + ",".join(choices) + "}" if choices else getattr(hint, "__name__", "value").upper()
        # a list may be given at once or flag by flag: the second flag must not silently undo the first
        listed: dict[str, Any] = {"nargs": "+", "action": "extend"} if is_list else {}
        parser.add_argument(f"--{name}", metavar=metavar, help=text, **listed)
