"""Reader of exemplars: solved problems for few-shot prompts of a teacher or a pretrained model."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import UserError
from trainer.problems.problem import Problem, RejectedRecord
from trainer.problems.sources import read_problems


def read_exemplars(path: str) -> list[Problem]:
    """Return all problems of a JSONL file (see jsonl.py) in order. Raises UserError naming the first invalid line."""
    found = []
    for record in read_problems("jsonl", Path(path).stem, path):
        if isinstance(record, RejectedRecord):
            raise UserError(
                f"{path}, line {record.line}: {record.reason}: {record.detail}; correct the exemplar"
            )
        found.append(record)
    return found
