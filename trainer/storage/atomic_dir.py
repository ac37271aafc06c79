"""Atomic publication of checkpoints, shards and exports: staging directory, SHA-256 digests, manifest last, rename.

`rename(2)` is atomic on local and parallel file systems, needs no lock (`flock` is a silent no-op on Lustre and GPFS),
and fails onto a directory that is not empty, so exactly one of several builders succeeds. Readers must reject a
directory without a manifest.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainer.errors import UserError

MANIFEST = "MANIFEST.json"
FORMAT = 1
_RENAMED_FACTS = {"learn_calculator_results": "train_on_calculator_results"}  # since version 0.1
_ABANDONED_AFTER_SECONDS = 24 * 3600


class ArtifactExistsError(Exception):
    """Another process published the same directory first; this process's staging directory is removed."""


@contextlib.contextmanager
def atomic_directory(final: Path, kind: str, facts: dict[str, Any], replace: bool = False) -> Iterator[Path]:
    """Context manager that yields a staging directory and publishes it as `final` on a normal exit.

    For directories written by one process. `facts` goes into the manifest and may be filled inside the block. An
    exception removes the staging directory. `replace` and errors as in `publish`.
    """
    staging = create_staging(final)
    try:
        yield staging
        publish(staging, final, kind, facts, digest_files(staging), replace)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def create_staging(final: Path) -> Path:
    """Create and return a uniquely named staging directory beside `final`."""
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.parent / f".{final.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    staging.mkdir()
    _remove_abandoned(final, staging)
    return staging


def digest_files(staging: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Flush files below `staging` (default: all) to disk and return {relative name: {bytes, sha256}}."""
    chosen = sorted(names) if names is not None else _files_below(staging)

    def flush_and_digest(name: str) -> dict[str, Any]:
        path = staging / name
        _fsync(path)
        return {"bytes": path.stat().st_size, "sha256": file_digest(path)}

    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(chosen, pool.map(flush_and_digest, chosen), strict=True))


def publish(
    staging: Path,
    final: Path,
    kind: str,
    facts: dict[str, Any],
    files: dict[str, dict[str, Any]],
    replace: bool = False,
) -> None:
    """Write the manifest and rename `staging` to `final`.

    `files` comes from `digest_files` and must list exactly the files below `staging`, else RuntimeError. Raises
    ArtifactExistsError if `final` exists; with `replace` it is replaced when the new directory is complete.
    """
    present = set(_files_below(staging))
    if present != set(files):
        raise RuntimeError(f"{staging}: files and digests differ: {sorted(present ^ set(files))}")
    manifest = {"format": FORMAT, "kind": kind, "facts": facts, "files": files}
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    _write_and_fsync(staging / MANIFEST, text.encode("utf-8"))
    for folder in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
        _fsync(folder)
    replaces = replace and final.exists()
    target = staging.with_suffix(".fresh.tmp") if replaces else final
    if not rename_unless_exists(staging, target):
        raise ArtifactExistsError(str(final))
    _fsync(final.parent)
    if replaces:
        try:
            replace_directory(final, target)
        except BaseException:
            if final.exists():  # else `target` is the only complete directory
                shutil.rmtree(target, ignore_errors=True)
            raise


def rename_unless_exists(source: Path, target: Path) -> bool:
    """Rename a directory; return False if `target` is a directory that is not empty."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def replace_directory(old: Path, new: Path) -> None:
    """Rename the published directory `new` to `old` and remove the old content.

    The names are exchanged atomically. Where the file system cannot do that (NFS, Lustre), `old` is missing between two
    renames; a kill at that moment loses nothing that cannot be made again.
    """
    replaced = new
    if not _exchange_names(old, new):
        replaced = old.parent / f".{old.name}.{secrets.token_hex(4)}.replaced.tmp"
        os.rename(old, replaced)
        os.rename(new, old)
    _fsync(old.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _exchange_names(one: Path, other: Path) -> bool:
    """Exchange two names with Linux's renameat2; return False where that is not supported."""
    at_working_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    names = (os.fsencode(os.path.abspath(one)), os.fsencode(os.path.abspath(other)))
    return bool(rename(at_working_directory, names[0], at_working_directory, names[1], exchange) == 0)


def is_complete(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def read_manifest(path: Path, kind: str | None = None) -> dict[str, Any]:
    """Return the manifest of a published directory. Raises UserError if it is missing, invalid or of another kind."""
    file = Path(path) / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        state = "is not finished (it has no manifest)" if Path(path).is_dir() else "does not exist"
        raise UserError(f"{path} {state}; expected a directory with {MANIFEST}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); the directory is damaged, make it again") from None
    tables = (manifest.get("facts"), manifest.get("files")) if isinstance(manifest, dict) else ()
    if not tables or not all(isinstance(table, dict) for table in tables) or manifest.get("format") != FORMAT:
        raise UserError(f"{file} is not a manifest of format {FORMAT}; it was made by another version")
    manifest["facts"] = {_RENAMED_FACTS.get(name, name): value for name, value in manifest["facts"].items()}
    if kind is not None and manifest.get("kind") != kind:
        raise UserError(f"{path} holds a finished {manifest.get('kind')}, expected a {kind}")
    return manifest


def verify_digests(path: Path, names: Iterable[str] | None = None) -> None:
    """Compare sizes, then digests, with the manifest (default: all files). Raises UserError naming the first bad file."""
    path = Path(path)
    files = read_manifest(path)["files"]
    chosen = sorted(files) if names is None else sorted(names)
    verify_sizes(path, chosen, files)
    with ThreadPoolExecutor(max_workers=4) as pool:
        for name, digest in zip(chosen, pool.map(lambda n: file_digest(path / n), chosen), strict=True):
            if digest != files[name]["sha256"]:
                raise UserError(
                    f"{path / name} is corrupt: its digest is not the manifest's; restore or rebuild it"
                )


def verify_sizes(path: Path, names: Iterable[str], files: dict[str, dict[str, Any]]) -> None:
    """Check that every named file exists with the size in `files`, the manifest's table. Raises UserError."""
    for name in names:
        if name not in files:
            raise UserError(f"{path / name} is not in the manifest of {path}")
        try:
            size = (path / name).stat().st_size
        except FileNotFoundError:
            raise UserError(f"{path / name} is missing although the manifest lists it") from None
        if size != files[name]["bytes"]:
            raise UserError(f"{path / name} has {size} bytes, the manifest says {files[name]['bytes']}")


def manifest_digest(path: Path) -> str:
    """Return the SHA-256 of the manifest. It covers all content, since the manifest lists every file's digest."""
    return file_digest(Path(path) / MANIFEST)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of one file in hexadecimal."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write one UTF-8 file atomically, see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write one file atomically: readers see the old or the new content. Creates missing parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        _write_and_fsync(staging, content)
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def _files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _write_and_fsync(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(final: Path, staging: Path) -> None:
    """Remove staging directories of killed builders: over 24 h older than `staging` by the file system's clock.

    A directory whose builder runs on this host is kept, since clocks may jump.
    """
    now = staging.stat().st_mtime
    for leftover in final.parent.glob(f".{final.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if now - leftover.stat().st_mtime > _ABANDONED_AFTER_SECONDS and not _builder_is_alive(leftover):
                shutil.rmtree(leftover)


def _builder_is_alive(staging: Path) -> bool:
    """Return whether host and pid in a staging directory's name are those of a running process of this host."""
    import psutil

    builder = staging.name.rpartition("-")[0]
    host, _, pid = builder.rpartition("-")
    is_of_this_host = host.endswith(f".{socket.gethostname()}") and pid.isdecimal()
    return is_of_this_host and psutil.pid_exists(int(pid))
