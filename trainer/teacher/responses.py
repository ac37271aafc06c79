"""Append-only log of responses, so that no request is paid for twice.

A request's key is a hash of everything that decides the response: the prompt, the model, the sampling parameters,
and the index of the sample. If the prompt or the model changes, the old responses stay in the file and are not used.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.runtime import terminal


@dataclass(frozen=True)
class TeacherRequest:
    """Request for one sample of one problem. Problems with equal prompts share keys and responses."""

    problem_id: str
    sample: int  # index, from 0
    prompt: str
    key: str


@dataclass(frozen=True)
class Response:
    """Response of a teacher. Token counts are None if the endpoint does not report them."""

    text: str
    finish_reason: str  # "stop", "length" or "content_filter"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def make_request(problem_id: str, sample: int, prompt: str, teacher: dict[str, Any]) -> TeacherRequest:
    """Return the request for one sample. `teacher`: JSON-serialisable dict of the model and the sampling parameters."""
    content = json.dumps({"teacher": teacher, "prompt": prompt, "sample": sample}, sort_keys=True)
    return TeacherRequest(problem_id, sample, prompt, hashlib.sha256(content.encode()).hexdigest())


class ResponseLog:
    """Log file of responses with access by key. If a key has several responses, the first is used.

    A killed process or a full disk can leave a partial last line. The constructor moves this line to the file
    `corrupt_lines`. Other unreadable lines stay in the log and are counted in `num_unreadable`. With `read_only`, no file is
    changed, and `append` must not be called. The constructor raises UserError if the log cannot be read or written.
    """

    def __init__(self, path: Path, corrupt_lines: Path, read_only: bool = False) -> None:
        self._path, self._descriptor = path, -1
        self._responses: dict[str, Response] = {}
        self.num_unreadable = 0
        try:
            content = path.read_bytes() if path.exists() else b""
            complete, newline, rest = content.rpartition(b"\n")
            for line in complete.split(b"\n"):
                self._read(line)
            if read_only:
                return
            if rest:
                with open(corrupt_lines, "ab") as file:
                    file.write(rest + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.truncate(path, len(complete) + len(newline))
                terminal.warning(
                    f"{path}: its last line is half written ({len(rest)} bytes); moved to {corrupt_lines.name}, "
                    "and only the request of this line is repeated"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"cannot use {path}: {error.strerror}; check disk and permissions") from error
        if self.num_unreadable:
            terminal.warning(f"{path}: {self.num_unreadable} lines are no responses; requests are repeated")

    def __len__(self) -> int:
        return len(self._responses)

    def get(self, key: str) -> Response | None:
        return self._responses.get(key)

    def num_unused(self, used: Iterable[str]) -> int:
        """Return the number of responses whose key is not in `used`."""
        return len(self._responses.keys() - set(used))

    def append(self, request: TeacherRequest, model: str, response: Response) -> None:
        """Append one response and fsync the file. Raises UserError if the write fails, e.g. because the disk is full."""
        assert self._descriptor >= 0, "the log is read-only"
        record = {"key": request.key, "problem": request.problem_id, "sample": request.sample, "model": model}
        # A text may contain a lone surrogate. UTF-8 cannot encode it, but json.dumps writes an ASCII escape.
        line = json.dumps({**record, **asdict(response)}).encode() + b"\n"
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, "the disk is full")
            os.fsync(self._descriptor)
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}; make room, run again") from error
        self._responses.setdefault(request.key, response)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _read(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            record = json.loads(line)
            values = [record[field.name] for field in fields(Response)]
            if not all(map(isinstance, values, (str, str, int | None, int | None))):
                raise TypeError
            self._responses.setdefault(str(record["key"]), Response(*values))
        except (ValueError, KeyError, TypeError, RecursionError):
            self.num_unreadable += 1
