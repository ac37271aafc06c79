"""What was asked and what was answered: a file that only grows, so that nothing is paid for twice.

A request's key is a hash of everything that decides its answer: the prompt, the model, the parameters and the number of
the sample. Another prompt or another model has other keys; their answers stay in the file and are never mixed in.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.runtime import terminal


@dataclass(frozen=True)
class Request:
    """One sample for one problem. Two problems with the same prompt share a key and so an answer."""

    problem_id: str
    sample: int  # from 0
    prompt: str
    key: str


@dataclass(frozen=True)
class Response:
    """What a teacher answered. Token counts are the endpoint's own; None where it tells none."""

    text: str
    finish_reason: str  # "stop", "length" or "content_filter"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def make_request(problem_id: str, sample: int, prompt: str, teacher: dict[str, Any]) -> Request:
    """`teacher`: the model and all parameters of the request, as JSON."""
    identity = json.dumps({"teacher": teacher, "prompt": prompt, "sample": sample}, sort_keys=True)
    return Request(problem_id, sample, prompt, hashlib.sha256(identity.encode()).hexdigest())


class ResponseLog:
    """The file of answers, as a mapping from key to Response. The first answer to a key is the one."""

    def __init__(self, path: Path, damaged: Path, read_only: bool = False) -> None:
        """Read what is there. A half-written last line (a kill, a full disk) is moved to `damaged`; other lines that
        cannot be read stay and are counted in `num_unreadable`. `read_only`: change nothing, `append` is not allowed.

        Raises UserError if the file cannot be read or written.
        """
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
                _set_aside(path, damaged, len(complete) + len(newline), rest)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(
                f"cannot use {path}: {error.strerror}; check the disk and its permissions"
            ) from error
        if self.num_unreadable:
            terminal.warning(
                f"{path}: {self.num_unreadable} lines are no responses; their requests are repeated"
            )

    def __len__(self) -> int:
        return len(self._responses)

    def get(self, key: str) -> Response | None:
        return self._responses.get(key)

    def num_others(self, used: Iterable[str]) -> int:
        """Answers in the file to none of these keys."""
        return len(self._responses.keys() - set(used))

    def append(self, request: Request, model: str, response: Response) -> None:
        """Write one answer, on the disk when this returns. Raises UserError when the disk is full."""
        assert self._descriptor >= 0, "the log was opened for reading"
        record = {"key": request.key, "problem": request.problem_id, "sample": request.sample, "model": model}
        line = (
            json.dumps({**record, **asdict(response)}).encode() + b"\n"
        )  # ASCII: also half a surrogate pair
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                raise OSError(28, "the disk is full")
            os.fsync(self._descriptor)
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; make room and run again"
            ) from error
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
            fields = (
                record["text"],
                record["finish_reason"],
                record["prompt_tokens"],
                record["completion_tokens"],
            )
            types = ((str,), (str,), (int, type(None)), (int, type(None)))
            if not all(isinstance(field, kind) for field, kind in zip(fields, types, strict=True)):
                raise TypeError
            self._responses.setdefault(str(record["key"]), Response(*fields))
        except (ValueError, KeyError, TypeError, RecursionError):
            self.num_unreadable += 1


def _set_aside(path: Path, damaged: Path, length: int, rest: bytes) -> None:
    """Cut the file after its last whole line; what follows goes to `damaged` first."""
    with open(damaged, "ab") as file:
        file.write(rest + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.truncate(path, length)
    terminal.warning(
        f"{path}: its last line is half written ({len(rest)} bytes); moved to {damaged.name}, "
        "and only that request is repeated"
    )
