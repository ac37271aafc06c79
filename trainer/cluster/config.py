"""Read `cluster.env`, the configuration of a cluster: partitions, account, GPUs per node, modules, scratch, time limits.

The file has `KEY=value` lines, which slurm/cluster.env.example explains. No shell reads the file. Every value is
checked before it is written to a batch script.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.storage.configuration import did_you_mean

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(,[A-Za-z0-9][A-Za-z0-9._-]*)*")
_CONSTRAINT = re.compile(r"[A-Za-z0-9._&|*\[\]()-]+")
_MODULE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+/-]*")
_PATH = re.compile(r"[A-Za-z0-9._/@:+,=~-]+")
_MEMORY = re.compile(r"[0-9]+[KMGT]?")
TIME = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d\d)")


def _match(pattern: re.Pattern[str], example: str, value: str, where: str) -> str:
    if value and not pattern.fullmatch(value):
        raise UserError(f"{where} is {value!r}; expected something like {example}")
    return value


def _choose(choices: tuple[str, ...], value: str, where: str) -> str:
    if value not in choices:
        raise UserError(f"{where} is {value!r}; choose one of {', '.join(choices)}")
    return value


def _integer(minimum: int, value: str, where: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) < minimum:
        raise UserError(f"{where} is {value!r}; it is a number, at least {minimum}")
    return int(value)


def _time(value: str, where: str) -> str:
    if not TIME.fullmatch(value) or value.count(":") + value.count("-") < 2:
        raise UserError(f"{where} is {value!r}; write HH:MM:SS or D-HH:MM:SS")
    return value


def _modules(value: str, where: str) -> tuple[str, ...]:
    return tuple(_match(_MODULE, "cuda/12.4 gcc/13", name, where) for name in value.split())


_name, _names = partial(_match, _NAME, "gpu"), partial(_match, _NAMES, "gpu or gpu,long")
_path, _memory = partial(_match, _PATH, "/scratch/me"), partial(_match, _MEMORY, "120G")
_binding = partial(_choose, ("node", "task"))
_runtime = partial(_choose, ("apptainer", "singularity", "pyxis"))


def _key(default: Any, parse: Callable[[str, str], Any]) -> Any:
    """Return a dataclass field. `parse(text, where)` converts a value of the file. `where`: location in error messages."""
    return dataclasses.field(default=default, metadata={"parse": parse})


@dataclass(frozen=True)
class ClusterConfig:
    """Settings of a cluster. Empty settings are not passed to sbatch, so that Slurm's defaults apply."""

    partition: str = _key("", _names)
    cpu_partition: str = _key("", _names)
    account: str = _key("", _name)
    qos: str = _key("", _name)
    constraint: str = _key("", partial(_match, _CONSTRAINT, "a100&nvlink"))
    reservation: str = _key("", _name)
    gpus_per_node: int = _key(0, partial(_integer, 0))
    gpu_type: str = _key("", _name)
    gpu_binding: str = _key("node", _binding)
    tasks_per_node: int = _key(1, partial(_integer, 1))
    cpus_per_task: int = _key(1, partial(_integer, 1))
    memory_per_node: str = _key("", _memory)
    cpu_memory: str = _key("", _memory)
    time_limit: str = _key("04:00:00", _time)
    evaluate_time_limit: str = _key("01:00:00", _time)
    cpu_time_limit: str = _key("01:00:00", _time)
    signal_seconds: int = _key(120, partial(_integer, 1))
    max_running: int = _key(0, partial(_integer, 0))
    modules: tuple[str, ...] = _key((), _modules)
    venv: str = _key(".venv", _path)
    container: str = _key("", _path)
    container_runtime: str = _key("apptainer", _runtime)
    scratch: str = _key("", _path)

    def __post_init__(self) -> None:
        if self.gpu_type and not self.gpus_per_node:
            raise UserError(f"GPU_TYPE is {self.gpu_type!r} but GPUS_PER_NODE is 0: no GPU is requested")
        for name in ("time_limit", "evaluate_time_limit"):
            if parse_seconds(getattr(self, name)) <= self.signal_seconds:
                raise UserError(
                    f"{name.upper()} is {getattr(self, name)}, not longer than SIGNAL_SECONDS ({self.signal_seconds} s), "
                    "the time for saving at the end of a job: increase the limit"
                )

    @property
    def max_ranks_per_node(self) -> int:
        """Maximum number of ranks on a node: its number of GPUs, or TASKS_PER_NODE if it has no GPUs."""
        return self.gpus_per_node or self.tasks_per_node


CLUSTER_KEYS = {field.name.upper(): field.metadata["parse"] for field in dataclasses.fields(ClusterConfig)}


def read_cluster_config(path: Path) -> ClusterConfig:
    """Return the settings in the file `path`. Raises UserError if the file cannot be read or a setting is not valid."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; copy slurm/cluster.env.example and fill in your cluster's settings"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return parse_cluster_config(text, str(path))


def parse_cluster_config(text: str, where: str) -> ClusterConfig:
    """Return the settings in `KEY=value` lines. Variables and commands are not expanded. `where`: location in messages.

    A value may be quoted. A line that starts with `#` is a comment. ` #` after a value without quotes starts a comment.
    """
    values: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), 1):
        location, line = f"{where}, line {number}", line.strip()
        if not line or line.startswith("#"):
            continue
        key, equals, value = line.partition("=")
        key, value = key.strip(), _without_comment(value.strip())
        if not equals:
            raise UserError(f"{location}: {line!r} is not KEY=value")
        if key not in CLUSTER_KEYS:
            raise UserError(
                f"{location}: unknown key {key!r}{did_you_mean(key, CLUSTER_KEYS)}; known: {', '.join(sorted(CLUSTER_KEYS))}"
            )
        if key.lower() in values:
            raise UserError(f"{location}: {key} is given twice")
        values[key.lower()] = CLUSTER_KEYS[key](value, f"{location}: {key}")
    try:
        return ClusterConfig(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def parse_seconds(limit: str) -> int:
    """Convert a time limit of Slurm (MM:SS, HH:MM:SS or D-HH:MM:SS) to seconds."""
    match = TIME.fullmatch(limit)
    assert match is not None, limit
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _without_comment(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value.partition(" #")[0].strip()
