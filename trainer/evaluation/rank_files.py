"""Predictions of every rank, on disk at once, and their union: every id exactly once or an error.

A rank appends to a file of its own that nobody else writes, so nothing is locked and nothing is lost but the problems
a killed rank was at. An evaluation that is started again goes on from these files.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer.errors import UserError
from trainer.runtime import distributed

_NAMED_IDS = 5


class RankFile:
    """The part file of this process: one prediction a line, handed to the operating system line by line.

    `identity` (of settings, student and problems) is in the name: parts of another making stay where they are and
    are not read.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{distributed.environment().rank}-{identity[:16]}-{secrets.token_hex(4)}.jsonl"
        self.path = folder / name
        self._file = open(self.path, "x", encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by __exit__)

    def append(self, prediction: dict[str, Any]) -> None:
        self._file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
        self._file.flush()

    def __enter__(self) -> RankFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._file.close()


def rank_files(folder: Path, identity: str) -> list[Path]:
    """Part files of an evaluation, finished or not."""
    return sorted(folder.glob(f"rank-*-{identity[:16]}-*.jsonl"))


def read_rank_file(path: Path) -> Iterator[dict[str, Any]]:
    """Predictions of a part file. A last line without its end (the writer was killed) is left out.

    Raises UserError naming file and line for a line that is no prediction.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                prediction = json.loads(line)
                prediction["id"], prediction["correct_strict"]
            except (ValueError, TypeError, KeyError):
                raise UserError(
                    f"{path}, line {number} is damaged; remove that line and evaluate again"
                ) from None
            yield prediction


def merge_predictions(predictions: Iterable[dict[str, Any]], ids: Sequence[str]) -> list[dict[str, Any]]:
    """The predictions in the order of `ids`. Raises UserError naming ids that are missing, doubled or unknown."""
    predictions = list(predictions)
    counts = Counter(prediction["id"] for prediction in predictions)
    faults = {
        "are missing": [i for i in ids if i not in counts],
        "occur more than once": [i for i, count in counts.items() if count > 1],
        "are not of these problems": list(counts.keys() - set(ids)),
    }
    told = [f"{_named(found)} {fault}" for fault, found in faults.items() if found]
    if told:
        raise UserError(
            f"predictions do not fit the problems: {'; '.join(told)}. "
            "Do two evaluations write one directory? Stop one, remove its parts folder and evaluate again"
        )
    by_id = {prediction["id"]: prediction for prediction in predictions}
    return [by_id[i] for i in ids]


def remove_rank_files(paths: Iterable[Path]) -> None:
    """Remove part files that have become part of a result, and their folder if nothing else is in it."""
    for path in paths:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()


class CapturedError:
    """A block of one rank's own work, without collectives: it keeps the error instead of raising it alone.

    Nobody is then left waiting for a rank that has given up. A fault that is not a UserError leaves its traceback on
    the rank it happened on.
    """

    def __init__(self) -> None:
        self.error: str | None = None

    def __enter__(self) -> CapturedError:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool:
        if isinstance(error, UserError):
            self.error = str(error)
        elif isinstance(error, Exception):
            traceback.print_exception(error)
            self.error = f"{type(error).__name__}: {error}"
        return self.error is not None

    def raise_on_all_ranks(self) -> None:
        """Collective: every rank raises if any rank failed."""
        distributed.raise_on_all_ranks(self.error)


@contextlib.contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """A block of each rank's own work, without collectives inside: if it fails on any rank, all ranks raise."""
    attempt = CapturedError()
    with attempt:
        yield
    attempt.raise_on_all_ranks()


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _NAMED_IDS} more" if len(ids) > _NAMED_IDS else ""
    return ", ".join(repr(i) for i in ids[:_NAMED_IDS]) + more
