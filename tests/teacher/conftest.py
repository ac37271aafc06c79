from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.problems import stories
from trainer.problems.jsonl import record_from_problem
from trainer.problems.problem import Problem

NUM_PROBLEMS = 12


@pytest.fixture(scope="session")
def solved_problems() -> dict[str, Problem]:
    """Problems with steps by question."""
    problems = stories.generate_problems("train", seed=7, num_problems=NUM_PROBLEMS, min_steps=1, max_steps=4)
    return {problem.question: problem for problem in problems}


@pytest.fixture
def data_file(tmp_path: Path, solved_problems: dict[str, Problem]) -> Path:
    """Return a JSONL file of the same problems without steps."""
    path = tmp_path / "mine.jsonl"
    records = [record_from_problem(problem) for problem in solved_problems.values()]
    for record in records:
        del record["steps"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
