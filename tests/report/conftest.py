from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_study import make_run, make_study

from trainer.run_directory import StudyDirectory


@pytest.fixture
def study(tmp_path: Path) -> StudyDirectory:
    """2 sizes x 3 methods x 2 seeds, and a run that was killed while it wrote a line of its log."""
    study = make_study(tmp_path / "quickstart")
    killed = make_run(study.path, "cot", "stories-13m", 13_107_200, seed=2, stop=92)
    with open(killed.metrics, "a") as file:
        file.write('{"step": 93, "loss": 0.4')
    return study
