"""Prediction files of the ranks, and their merge, which must contain every id exactly once.

Each rank appends to its own file, so no lock is needed and a killed rank loses only its unfinished problems. A restarted
evaluation resumes from these files.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.runtime import distributed

_MAX_LISTED_IDS = 5


class RankFile:
    """Context manager for this process's prediction file: JSON lines, flushed after every line.

    The file name contains the start of the job fingerprint, so files of other settings are kept but not read.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{distributed.environment().rank}-{fingerprint[:16]}-{secrets.token_hex(4)}.jsonl"
        self.path = folder / name
        self._file = open(self.path, "x", encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by __exit__)

    def append(self, prediction: dict[str, Any]) -> None:
        self._file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
        self._file.flush()

    def __enter__(self) -> RankFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def list_rank_files(folder: Path, fingerprint: str) -> list[Path]:
    """Return the rank files of an evaluation, finished or not."""
    return sorted(folder.glob(f"rank-*-{fingerprint[:16]}-*.jsonl"))


def read_rank_files(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield the predictions of rank files, without truncated last lines (their writers were killed).

    Raises UserError naming file and line for a line that is not a prediction.
    """
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    prediction = json.loads(line)
                    prediction["id"], prediction["correct_strict"]
                except (ValueError, TypeError, KeyError):
                    raise UserError(
                        f"{path}, line {number} is corrupt; remove that line and evaluate again"
                    ) from None
                yield prediction


def merge_predictions(predictions: Iterable[dict[str, Any]], ids: Sequence[str]) -> list[dict[str, Any]]:
    """Return the predictions in the order of `ids`. Raises UserError naming missing, repeated or unknown ids."""
    predictions = list(predictions)
    counts = Counter(prediction["id"] for prediction in predictions)
    problems = {
        "are missing": [i for i in ids if i not in counts],
        "occur more than once": [i for i, count in counts.items() if count > 1],
        "are not of these problems": list(counts.keys() - set(ids)),
    }
    messages = []
    for problem, found in problems.items():
        listed = ", ".join(repr(i) for i in found[:_MAX_LISTED_IDS])
        num_more = len(found) - _MAX_LISTED_IDS
        if found:
            messages.append(f"{listed}{f' and {num_more} more' if num_more > 0 else ''} {problem}")
    if messages:
        raise UserError(
            f"predictions do not match the problems: {'; '.join(messages)}. "
            "Do two evaluations write to one directory? Stop one, remove its parts folder and evaluate again"
        )
    by_id = {prediction["id"]: prediction for prediction in predictions}
    return [by_id[i] for i in ids]


def remove_rank_files(paths: Iterable[Path]) -> None:
    """Remove rank files that have been merged, and their folder if it is empty then."""
    for path in paths:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()


class CapturedError:
    """Context manager that stores an exception of this rank, so that all ranks can raise it together.

    The block must contain no collectives. The traceback of an exception other than UserError is printed on its rank.
    """

    def __init__(self) -> None:
        self.error: str | None = None

    def __enter__(self) -> CapturedError:
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> bool:
        if isinstance(error, UserError):
            self.error = str(error)
        elif isinstance(error, Exception):
            traceback.print_exception(error)
            self.error = f"{type(error).__name__}: {error}"
        return self.error is not None


@contextlib.contextmanager
def any_error_on_all_ranks() -> Iterator[None]:
    """Context manager that raises on all ranks if its block, which must contain no collectives, fails on any rank."""
    captured = CapturedError()
    with captured:
        yield
    distributed.raise_on_all_ranks(captured.error)
