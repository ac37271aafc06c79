"""Atomic publication of directories: checkpoints, shards, exports and annotations.

All files are written to a staging directory. The last file is a manifest with the SHA-256 digests of the other files. Then
the directory is renamed. `rename(2)` is atomic on local and parallel file systems and needs no lock (`flock` is a silent
no-op on Lustre and GPFS). The rename fails if the target is a directory that is not empty. So if several processes build
the same directory, exactly one succeeds. Readers must reject a directory without a manifest.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.storage.manifest import FileDigest, Manifest

MANIFEST = "MANIFEST.json"
MANIFEST_FORMAT = 1
_RENAMED_FACTS = {"learn_calculator_results": "train_on_calculator_results"}  # name in 0.1.0 -> current name
_EXPECTED = {
    "shards": "shards made by tools/prepare_shards.py",
    "checkpoint": "a checkpoint made by tools/train.py",
    "export": "an export made by tools/convert_checkpoint.py",
    "annotations": "annotations made by tools/annotate.py",
}
_ABANDONED_AFTER_SECONDS = 24 * 3600


class ArtifactExistsError(Exception):
    """Raised by `publish` if the directory exists already, e.g. because another process has published it."""


@contextlib.contextmanager
def atomic_directory(
    final: Path, kind: str, facts: Mapping[str, Any], replace: bool = False
) -> Iterator[Path]:
    """Context manager that yields a staging directory and publishes it as `final` on a normal exit.

    Must be used in one process only. The manifest with `facts` is written at the exit, so the `with` block may add entries
    to `facts`. After an exception, the staging directory is removed. See `publish` for `replace` and the errors.
    """
    staging = create_staging(final)
    try:
        yield staging
        publish(staging, final, kind, facts, digest_files(staging), replace)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def create_staging(final: Path) -> Path:
    """Create and return a uniquely named staging directory beside `final`. Remove abandoned directories of `final`."""
    if final.is_file():
        raise UserError(f"{final} is a file; choose another output directory")
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.parent / f".{final.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    staging.mkdir()
    _remove_abandoned(final, staging)
    return staging


def digest_files(staging: Path, names: Iterable[str] | None = None) -> dict[str, FileDigest]:
    """Flush the files `names` below `staging` (None: all files) to disk. Return {relative name: size and digest}."""
    sorted_names = sorted(names) if names is not None else _files_below(staging)

    def flush_and_digest(name: str) -> FileDigest:
        path = staging / name
        _fsync(path)
        return {"bytes": path.stat().st_size, "sha256": file_digest(path)}

    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(sorted_names, pool.map(flush_and_digest, sorted_names), strict=True))


def publish(
    staging: Path,
    final: Path,
    kind: str,
    facts: Mapping[str, Any],
    files: dict[str, FileDigest],
    replace: bool = False,
) -> None:
    """Write the manifest and rename `staging` to `final`. If `replace` is true, `final` may exist and is replaced.

    `files`: output of `digest_files`. Raises RuntimeError unless `files` lists exactly the files below `staging`, and
    ArtifactExistsError if `final` is a directory that is not empty and `replace` is false.
    """
    present = set(_files_below(staging))
    if present != set(files):
        raise RuntimeError(f"{staging}: files and digests differ: {sorted(present ^ set(files))}")
    manifest = {"format": MANIFEST_FORMAT, "kind": kind, "facts": facts, "files": files}
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
            if final.exists():  # if `final` is missing, `target` holds the new content and must be kept
                shutil.rmtree(target, ignore_errors=True)
            raise


def rename_unless_exists(source: Path, target: Path) -> bool:
    """Rename a directory and return True. If `target` is a directory that is not empty, only return False."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def replace_directory(old: Path, new: Path) -> None:
    """Put the complete directory `new` in the place of `old`, and remove the old content.

    If the file system can exchange two names, this is one atomic call. On other file systems (NFS, Lustre), first `old` is
    renamed to a temporary name, then `new` is renamed to `old`. If the process is killed between these two renames, the path
    `old` does not exist, and both directories have temporary names.
    """
    replaced = new
    if not _exchange_names(old, new):
        replaced = old.parent / f".{old.name}.{secrets.token_hex(4)}.replaced.tmp"
        os.rename(old, replaced)
        os.rename(new, old)
    _fsync(old.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _exchange_names(left: Path, right: Path) -> bool:
    """Exchange two names with Linux's `renameat2`. Return False if the call is not available or fails, else True."""
    at_working_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    names = [os.fsencode(path.absolute()) for path in (left, right)]
    return bool(rename(at_working_directory, names[0], at_working_directory, names[1], exchange) == 0)


def is_complete(path: Path) -> bool:
    """Return whether `path` is a published directory, i.e. has a manifest."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path, kind: str | None = None) -> Manifest:
    """Return a directory's manifest. Raises UserError if the manifest is missing, invalid or not of `kind` (None: any)."""
    file = path / MANIFEST
    expected = _EXPECTED.get(str(kind), f"a directory with {MANIFEST}")
    try:
        manifest: Manifest = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        state = "is a file" if path.is_file() else "does not exist"
        if path.is_dir():
            state = f"is not finished, or holds something else (it has no {MANIFEST})"
        raise UserError(f"{path} {state}; expected {expected}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); the directory is damaged, make it again") from None
    fields = manifest if isinstance(manifest, dict) else {}
    has_tables = isinstance(fields.get("facts"), dict) and isinstance(fields.get("files"), dict)
    if not has_tables or fields.get("format") != MANIFEST_FORMAT:
        raise UserError(f"{file} is not a manifest of format {MANIFEST_FORMAT}; another version made it")
    manifest["facts"] = {_RENAMED_FACTS.get(name, name): value for name, value in manifest["facts"].items()}
    if kind is not None and manifest.get("kind") != kind:
        raise UserError(
            f"{path} holds {_EXPECTED.get(manifest.get('kind', ''), 'something else')}; expected {expected}"
        )
    return manifest


def verify_digests(path: Path, names: Iterable[str] | None = None) -> None:
    """Raise UserError if a file in `names` (None: all files) differs from the manifest in size or digest."""
    files = read_manifest(path)["files"]
    names = sorted(files if names is None else names)
    verify_sizes(path, names, files)
    with ThreadPoolExecutor(max_workers=4) as pool:
        for name, digest in zip(names, pool.map(lambda name: file_digest(path / name), names), strict=True):
            if digest != files[name]["sha256"]:
                raise UserError(f"{path / name} is corrupt: its digest is not the manifest's; rebuild it")


def verify_sizes(path: Path, names: Iterable[str], files: dict[str, FileDigest]) -> None:
    """Raise UserError unless every file in `names` has the size stated in `files`, the manifest's dict of files."""
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
    """Return the SHA-256 of the manifest. This digest identifies all content, because the manifest has all files' digests."""
    return file_digest(path / MANIFEST)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of one file in hexadecimal."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write one UTF-8 file atomically, as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write one file atomically: readers see either the old or the new content. Creates missing parent folders."""
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
    path.write_bytes(content)
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(final: Path, staging: Path) -> None:
    """Remove staging directories of `final` that were last modified more than 24 hours before `staging`.

    Clocks may jump, so a directory is kept if the process that created it still runs on this host.
    """
    now = staging.stat().st_mtime
    for leftover in final.parent.glob(f".{final.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if now - leftover.stat().st_mtime > _ABANDONED_AFTER_SECONDS and not _builder_is_alive(leftover):
                shutil.rmtree(leftover)


def _builder_is_alive(staging: Path) -> bool:
    """Return whether the staging directory's name contains this host's name and the pid of a live process."""
    import psutil

    host, _, pid = staging.name.rpartition("-")[0].rpartition("-")
    is_of_this_host = host.endswith(f".{socket.gethostname()}") and pid.isdecimal()
    return is_of_this_host and psutil.pid_exists(int(pid))
