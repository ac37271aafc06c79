from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest

from tests.slurm_cluster import cluster  # noqa: F401 (a fixture)

# A shell that starts us in the background has us ignore SIGINT, and our children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """What the test files imported (torch, transformers, ...) stays: no later collection looks through it again."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the published data sets (gsm8k/, svamp/, strategyqa/, gpt2-tokenizer/); see tests/README.md."""
    folder = Path(os.environ.get("SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set SHARED_DATA to a folder with gsm8k/, svamp/, ...")
    return folder.resolve()
