"""Solved problems that a teacher or a model that was never distilled is shown: a short file in which every line counts."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import UserError
from trainer.problems.problem import Problem, RejectedRecord
from trainer.problems.sources import read_problems


def read_exemplars(path: str) -> list[Problem]:
    """All problems of a JSONL file (see jsonl.py), in order. Raises UserError naming the line that is none."""
    found = []
    for record in read_problems("jsonl", Path(path).stem, path):
        if isinstance(record, RejectedRecord):
            raise UserError(
                f"{path}, line {record.line}: {record.reason}: {record.detail}; mend the exemplar"
            )
        found.append(record)
    return found
