"""One process writes into an annotation directory: two would pay for the same requests.

The lock is a file that says who holds it, made whole under another name and put in its place by a hard link, which
fails if there is one already (`link(2)` is atomic on network file systems too, where `flock` may do nothing at all).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from trainer import terminal
from trainer.errors import UserError


@contextlib.contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Hold `lock` while in use. Raises UserError, naming process and host, if another one holds it.

    A lock whose process is gone is taken over if the process was of this host; of another host nobody can tell.
    """
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    lock.parent.mkdir(parents=True, exist_ok=True)
    draft = lock.with_name(f".{lock.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        draft.write_text(json.dumps(mine) + "\n", encoding="utf-8")
        while not _link(draft, lock):
            _remove_if_stale(lock)
    finally:
        draft.unlink(missing_ok=True)
    try:
        yield
    finally:
        if _read(lock) == mine:
            lock.unlink(missing_ok=True)


def _link(draft: Path, lock: Path) -> bool:
    try:
        os.link(draft, lock)
    except FileExistsError:
        return False
    return True


def _remove_if_stale(lock: Path) -> None:
    holder = _read(lock)
    if holder is None:
        if lock.exists():
            raise UserError(f"{lock} is no lock of ours; delete it if no process annotates there")
        return  # given back in this moment
    name = f"process {holder['pid']} on {holder['host']}"
    if holder["host"] != socket.gethostname():
        raise UserError(f"{lock.parent} is in use by {name}; if that process is gone, delete {lock}")
    if _lives(holder):
        raise UserError(f"{lock.parent} is in use by {name}; wait for it, or choose another output_dir")
    # Two processes may find the same dead holder. Whoever moves the file away looks at what he got: if it is not the
    # dead one's, the other was faster, and its lock goes back.
    aside = lock.with_name(f".{lock.name}.{os.getpid()}-{secrets.token_hex(4)}.stale.tmp")
    try:
        os.rename(lock, aside)
    except FileNotFoundError:
        return
    if _read(aside) == holder:
        terminal.warn(f"{lock.parent}: taking over from {name}, which is gone")
    else:
        _link(aside, lock)
    aside.unlink(missing_ok=True)


def _lives(holder: dict[str, Any]) -> bool:
    """Whether the process exists; its start time tells it from a later one with the same number."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(holder["pid"])
        try:
            return process.status() != psutil.STATUS_ZOMBIE and (
                abs(process.create_time() - holder["started"]) < 1
            )
        except psutil.AccessDenied:
            return True
    return False


def _read(lock: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(lock.read_text(encoding="utf-8"))
        return {"host": str(record["host"]), "pid": int(record["pid"]), "started": float(record["started"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
