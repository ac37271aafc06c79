"""Write one prediction file per rank and merge the files.

A killed rank loses only its unfinished problems: a restarted evaluation resumes from these files.
"""

import contextlib
import json
import secrets
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from trainer.errors import UserError
from trainer.runtime import distributed
from trainer.storage.manifest import Prediction

_MAX_LISTED_IDS = 5


class RankFile(contextlib.AbstractContextManager["RankFile"]):
    """Prediction file of this process: JSON lines, flushed after every line. Context manager that closes the file on exit.

    The file name contains the first 16 characters of `fingerprint`, which identifies the evaluation job. So
    `list_rank_files` does not return the files of other jobs.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rank = distributed.environment().rank
        self.path = folder / f"rank-{rank}-{fingerprint[:16]}-{secrets.token_hex(4)}.jsonl"
        self._file = open(self.path, "x", encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by __exit__)

    def append(self, prediction: Prediction) -> None:
        self._file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
        self._file.flush()

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def list_rank_files(folder: Path, fingerprint: str) -> list[Path]:
    """Return the rank files of the job with this fingerprint."""
    return sorted(folder.glob(f"rank-*-{fingerprint[:16]}-*.jsonl"))


def read_rank_files(paths: Iterable[Path]) -> Iterator[Prediction]:
    """Yield the predictions of rank files, without the truncated last line that a killed process leaves.

    Raises UserError, with file and line number, for a line that is not a prediction.
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
                    message = f"{path}, line {number} is corrupt; remove that line and evaluate again"
                    raise UserError(message) from None
                yield prediction


def merge_predictions(predictions: Iterable[Prediction], ids: Sequence[str]) -> list[Prediction]:
    """Return the predictions in the order of `ids`. Raises UserError for ids that are missing, repeated or unknown."""
    predictions = list(predictions)
    counts = Counter(prediction["id"] for prediction in predictions)
    wrong_ids = {
        "are missing": [i for i in ids if i not in counts],
        "occur more than once": [i for i, count in counts.items() if count > 1],
        "are not of these problems": list(counts.keys() - set(ids)),
    }
    messages = []
    for fault, listed in wrong_ids.items():
        if listed:
            num_more = len(listed) - _MAX_LISTED_IDS
            more = f" and {num_more} more" if num_more > 0 else ""
            messages.append(f"{', '.join(map(repr, listed[:_MAX_LISTED_IDS]))}{more} {fault}")
    if messages:
        raise UserError(
            f"predictions do not match the problems: {'; '.join(messages)}. "
            "Do two evaluations write to one directory? Stop one, remove its parts folder and evaluate again"
        )
    by_id = {prediction["id"]: prediction for prediction in predictions}
    return [by_id[i] for i in ids]


def remove_rank_files(paths: Iterable[Path]) -> None:
    """Remove rank files, and their folder if no file is left in it."""
    for path in paths:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()


@contextlib.contextmanager
def capture_error() -> Iterator[list[str]]:
    """Context manager that yields a list. If the block raises an exception, the exception's message is appended to the list.

    The exception is suppressed. Its traceback is printed, except for a UserError.
    """
    messages: list[str] = []
    try:
        yield messages
    except UserError as error:
        messages.append(str(error))
    except Exception as error:
        traceback.print_exception(error)
        messages.append(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def any_error_on_all_ranks() -> Iterator[None]:
    """Context manager that raises UserError on all ranks if the block fails on any rank. Use no collectives in the block."""
    with capture_error() as messages:
        yield
    distributed.raise_on_all_ranks("".join(messages))
