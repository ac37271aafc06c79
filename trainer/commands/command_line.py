"""Command line of a settings dataclass: flags, `--help` and the YAML file of `--config`."""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from trainer.errors import UserError
from trainer.runtime import terminal
from trainer.storage.configuration import did_you_mean, from_dict, rename_old_keys

Settings = TypeVar("Settings")
_NUM_GPUS_HELP = "start N ranks on this machine with DeepSpeed's launcher (N processes if there are no GPUs)"


def parse(cls: type[Settings], description: str, arguments: list[str] | None = None) -> Settings:
    """Return the settings of a command line. Flags take precedence over the YAML file of `--config`.

    `--local_rank N`, which DeepSpeed's launcher adds, is accepted and ignored: the rank is read from the environment. For an
    invalid flag, value or file, prints one error message and exits with status 2.
    """
    return _parse(_parser(cls, description), cls, arguments)[0]


def _parse(
    parser: argparse.ArgumentParser, cls: type[Settings], arguments: list[str] | None = None
) -> tuple[Settings, int | None]:
    """Return the settings, and the value of --num_gpus if the parser has this flag and it is set."""
    flags = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    flags.pop("local_rank", None)
    num_gpus = flags.pop("num_gpus", None)
    config = flags.pop("config", None)
    try:
        values = read_yaml(Path(config)) if config else {}
        # Rename old names before the merge. A flag then overrides the file's value even if the file has the old name.
        rename_old_keys(cls, values, str(config), terminal.deprecation)
        rename_old_keys(cls, flags, "flags", terminal.deprecation)
        where = f"{config} and flags" if config else "flags"
        return from_dict(cls, {**values, **flags}, where), num_gpus
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def command(
    cls: type[Settings], description: str, launches_as: str = ""
) -> Callable[[Callable[[Settings], object]], Callable[[], None]]:
    """Return a decorator for a function with one argument of type `cls`. The decorated function parses it from the flags.

    `launches_as`: name of the command if it has the flag --num_gpus, which starts it on several ranks.
    """

    def decorate(run: Callable[[Settings], object]) -> Callable[[], None]:
        def main() -> None:
            parser = _parser(cls, description)
            if launches_as:
                parser.add_argument("--num_gpus", type=int, metavar="N", help=_NUM_GPUS_HELP)
            settings, num_gpus = _parse(parser, cls)
            if num_gpus is None:
                terminal.run_main(lambda: run(settings))
            else:
                from trainer.commands.launcher import launch_ranks

                terminal.run_main(lambda: launch_ranks(launches_as, settings, num_gpus))

        return main

    return decorate


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, {} for an empty file. Raises UserError if the file is missing or invalid."""
    import yaml  # slow to import, and not needed without --config

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        similar = did_you_mean(path.name, (other.name for other in path.parent.glob("*.yaml")))
        raise UserError(f"{path} does not exist{similar}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found a {type(values).__name__}")
    return values


def new_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser that keeps the line breaks of `description` in `--help`. The caller adds the flags."""
    return _Parser(
        prog=Path(sys.argv[0]).name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


class _Parser(argparse.ArgumentParser):
    """Parser that reports an error in one line. For an unknown flag, the line suggests the most similar known flag."""

    def __init__(self, **options: Any) -> None:
        self._flags: list[str] = []
        super().__init__(**options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        self._flags += names
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").partition(" ")[0].partition("=")[0]
        if unknown != message and unknown.startswith("--"):
            message = f"unknown flag {unknown}{did_you_mean(unknown, self._flags)}"
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def _parser(cls: type, description: str) -> argparse.ArgumentParser:
    parser = new_parser(description)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags take precedence")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        for name in (field.name, *field.metadata.get("old_names", ())):
            _add(parser, field, hints[field.name], name)
    return parser


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any, name: str) -> None:
    """Add the flag `name` of a setting. `--help` hides the flag if `name` is an earlier name of the setting."""
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
        # Users may repeat the flag of a list: "extend" appends the values of each flag instead of replacing the list.
        listed: dict[str, Any] = {"nargs": "+", "action": "extend"} if is_list else {}
        parser.add_argument(f"--{name}", metavar=metavar, help=text, **listed)
