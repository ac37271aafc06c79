"""Kill and restart conversions for test_killed.py: killed_converter.py RUNS.json

RUNS.json: {instant: run directory}. Prints as JSON the visible state after each kill, and the export's files after the same
command ran again. Each conversion runs in a fork of this process, which has done the imports.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers.models.gpt2.modeling_gpt2  # noqa: F401 (imported by conversions)

from trainer.errors import UserError
from trainer.export import (
    config_check,  # noqa: F401
    convert,
    output_file,
)
from trainer.settings import ConvertSettings
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory
from trainer.zero import (
    checksum_reader,  # noqa: F401
)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(module: Any, name: str, number: int = 1, before: bool = True) -> Callable[[], None]:
    """Return a function that makes the process die before or after call `number` (from 1) of a function."""

    def arm() -> None:
        real, calls = getattr(module, name), []

        def faulty(*arguments: Any, **named: Any) -> Any:
            calls.append(name)
            if before and len(calls) == number:
                die()
            result = real(*arguments, **named)
            if not before and len(calls) == number:
                die()
            return result

        setattr(module, name, faulty)

    return arm


# The manifest is the last file that `publish` writes.
INSTANTS: dict[str, Callable[[], None]] = {
    "in the middle of the weights": at_call(output_file.OutputFile, "advance", 4),
    "before a write": at_call(output_file, "_write"),
    "after a write": at_call(output_file, "_write", before=False),
    "weights written": at_call(convert, "_write_small_files"),
    "before the manifest": at_call(atomic_dir, "_write_and_fsync"),
    "after the manifest": at_call(atomic_dir, "_write_and_fsync", before=False),
    "before the rename": at_call(os, "rename"),
    "after the rename": at_call(os, "rename", before=False),
    "replacing, before the exchange": at_call(atomic_dir, "_exchange_names"),
    "replacing, after the exchange": at_call(atomic_dir, "_exchange_names", before=False),
}


def convert_in_fork(run: RunDirectory, arm: Callable[[], None] | None, overwrite: bool) -> int:
    """Run a conversion in a fork and return its exit status, negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            if arm:
                arm()
            convert.convert(ConvertSettings(str(run.path), overwrite=overwrite))
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def visible(run: RunDirectory) -> str:
    """Return "none", "complete", or the error of an incomplete export."""
    if not run.export.exists():
        return "none"
    try:
        atomic_dir.verify_digests(run.export)
        return "complete"
    except UserError as error:
        return str(error)


def main() -> None:
    found = {}
    for instant, path in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")).items():
        run, replacing = RunDirectory(Path(path)), instant.startswith("replacing")
        first = convert_in_fork(run, None, False) if replacing else None
        killed = convert_in_fork(run, INSTANTS[instant], replacing)
        seen = visible(run)
        again = convert_in_fork(run, None, False)
        files = atomic_dir.read_manifest(run.export)["files"] if run.export.exists() else {}
        found[instant] = {"first": first, "killed": killed, "seen": seen, "again": again, "files": files}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
