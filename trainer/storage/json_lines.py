"""Read JSON Lines files whose writer may have been killed in the middle of a line."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json_lines(path: Path, tail_bytes: int | None = None) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield (line number, record) for every line that is not blank; the record of an unreadable line is None.

    A line is unreadable if it is not UTF-8, not JSON or not an object. A missing file has no lines. `tail_bytes`: read
    only the lines that lie completely in the last `tail_bytes` bytes. Their line numbers start at 1.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        if tail_bytes is not None and os.fstat(file.fileno()).st_size > tail_bytes:
            file.seek(-tail_bytes - 1, os.SEEK_END)
            file.readline()  # skip the rest of a line that begins before the tail
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:  # JSONDecodeError and UnicodeDecodeError
                record = None
            yield number, record if isinstance(record, dict) else None
