from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.report.synthetic_study import (
    EVALUATED_ONLY,
    METHODS,
    make_run,
    make_scaling_study,
    make_study,
    write_evaluation,
)
from trainer.report.build import build_report
from trainer.storage.run_directory import StudyDirectory

GPT2 = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080}


@pytest.fixture
def study(tmp_path: Path) -> StudyDirectory:
    """2 sizes x 3 methods x 2 seeds, and a run that was killed while it wrote a line of its log."""
    study = make_study(tmp_path / "quickstart")
    killed = make_run(study.path, "cot", "stories-13m", 13_107_200, seed=2, stop=92)
    with open(killed.metrics, "a") as file:
        file.write('{"step": 93, "loss": 0.4')
    return study


@pytest.fixture(scope="session")
def whole_study(tmp_path_factory: pytest.TempPathFactory) -> StudyDirectory:
    """3 sizes x all evaluated methods, one seed, on 60 problems named gsm8k; some also without calculator."""
    methods = (*METHODS, *EVALUATED_ONLY)
    about: dict[str, Any] = {"data": "gsm8k", "train_data": "gsm8k", "num_problems": 60}
    study = make_study(tmp_path_factory.mktemp("runs") / "whole", GPT2, methods, seeds=(0,), **about)
    for level, (model, size) in enumerate(GPT2.items()):
        for method in ("cot", "iterative_interleaved"):
            run = study.run(f"stories.{method}.{model}.s0")
            write_evaluation(run, method, model, size, 0, level, calculator=False, **about)
    return study


@pytest.fixture(scope="session")
def whole_report(whole_study: StudyDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report([whole_study.path], tmp_path_factory.mktemp("report"), max_examples=1000).parent


@pytest.fixture(scope="session")
def scaling_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Report of 5 sizes x 4 methods, with fitted curves, three seeds at one size, and accuracies from 0 to 100 %."""
    study = make_scaling_study(tmp_path_factory.mktemp("runs") / "scaling", num_problems=150)
    return build_report([study.path], tmp_path_factory.mktemp("scaling"), max_examples=200).parent
