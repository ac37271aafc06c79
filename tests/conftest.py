from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from types import ModuleType

import pytest

from tests.slurm_cluster import cluster  # noqa: F401 (a fixture)

# A shell starts background jobs with SIGINT ignored, which subprocesses of the tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent


# Modules whose use makes a test file one that starts processes of its own.
_PROCESS_MODULES = {"subprocess", "multiprocessing", "tests.distributed", "tests.faults.forked_ranks"}
_PROCESS_MODULES |= {"tests.report.chromium", "tests.study.test_study_run"}
# Files of one process that take longest, by measurement: the others together fit into 3 minutes on two cores.
_COMPUTE_FILES = {
    *("evaluation/test_evaluate.py", "evaluation/test_few_shot.py", "evaluation/test_generate.py"),
    *("evaluation/test_pairs.py", "export/test_base_files.py", "export/test_families.py"),
    *("models/test_attention_features.py", "models/test_families.py", "models/test_tokenizer.py"),
    *("shards/test_guidance.py", "shards/test_sentencepiece.py", "training/test_one_trajectory.py"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test that is neither slow nor a fault test one of the marks cluster, processes, compute and unit."""
    kinds: dict[Path, str] = {}
    for item in items:
        if item.path not in kinds:
            kinds[item.path] = _kind(item)
        if item.get_closest_marker("slow") or item.get_closest_marker("faults"):
            continue
        item.add_marker("cluster" if "cluster" in getattr(item, "fixturenames", ()) else kinds[item.path])


def _kind(item: pytest.Item) -> str:
    """Return the mark of the item's file."""
    used = vars(item.module).values() if isinstance(item, pytest.Function) else ()
    modules = {
        value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "")
        for value in used
    }
    if "tests.slurm_cluster" in modules:
        return "cluster"
    if modules & _PROCESS_MODULES:
        return "processes"
    is_long = item.path.relative_to(REPOSITORY / "tests").as_posix() in _COMPUTE_FILES
    return "compute" if is_long else "unit"


def pytest_collection_finish() -> None:
    """Exclude the imported modules (torch, transformers, ...) from later garbage collections."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder with the published data sets (gsm8k/, svamp/, strategyqa/, gpt2-tokenizer/); see tests/README.md."""
    folder = Path(os.environ.get("SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set SHARED_DATA to a folder with gsm8k/, svamp/, ...")
    return folder.resolve()
