from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.study.study_file import Study, load_study

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = ("annotate", "prepare_shards", "train", "convert_checkpoint", "evaluate", "plot_scaling")
VALUES: dict[str, Any] = {
    "study": "tiny",
    "num_ranks": 2,
    "data": {"stories": {"train": {"num_problems": 300}, "test": {"num_problems": 30}}},
    "models": {"small": {"config_name": "stories-0.2m"}},
    "methods": ["answer_only", "cot"],
    "prepare": {"tokenizer_name": "stories"},
    "train": {"max_steps": 2},
}


@pytest.fixture
def values() -> dict[str, Any]:
    """Return the content of a study file with two runs and nine stages."""
    return copy.deepcopy(VALUES)


@pytest.fixture
def make_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Study]:
    """Return a function that loads a study in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda values: load_study(values, Path("tiny.yaml"))


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a tools folder with the real study.py, and stand_in.py under the names of the other tools."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS:
        shutil.copy(Path(__file__).with_name("stand_in.py"), folder / f"{name}.py")
    shutil.copy(REPOSITORY / "tools" / "study.py", folder / "study.py")
    path = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(part for part in path if part))
    return folder
