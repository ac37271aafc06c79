from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.study.study_file import Study, load_study

STUDY: dict[str, Any] = {
    "study": "tiny",
    "num_ranks": 2,
    "data": {"stories": {"train": {"num_problems": 60}, "test": {"num_problems": 8, "seed": 3}}},
    "models": {"0.2m": {"config_name": "stories-0.2m"}},
    "methods": ["answer_only", "cot"],
    "prepare": {"tokenizer_name": "stories", "num_processes": 1},
    "train": {"max_steps": 4, "pack_length": 512, "save_steps": 2},
    "evaluate": {"max_new_tokens": 8},
}


@pytest.fixture
def values() -> dict[str, Any]:
    """Return the content of a study file with two runs and nine stages."""
    return copy.deepcopy(STUDY)


@pytest.fixture
def make_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Study]:
    """Return a function that loads a study in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda values: load_study(values, Path("tiny.yaml"))
