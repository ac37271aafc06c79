"""A converter killed at any instant leaves a complete export or none; the same command then gives the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_well
from tests.export.killed_converter import INSTANTS
from trainer.export.convert import convert
from trainer.settings import ConvertSettings
from trainer.storage import atomic_dir

pytestmark = pytest.mark.faults
CASE = "gpt2-zero2-bf16-2ranks"


@pytest.fixture(scope="module")
def killed(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of killed_converter.py by instant."""
    folder = tmp_path_factory.mktemp("killed")
    runs = {}
    for number, instant in enumerate(INSTANTS):
        runs[instant] = str(folder / str(number))
        shutil.copytree(
            checkpoints / CASE / "checkpoints" / "step-000002",
            folder / str(number) / "checkpoints" / "step-000002",
        )
    (folder / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    printed = run_well(["-m", "tests.export.killed_converter", str(folder / "runs.json")])
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("instant", INSTANTS)
def test_killed_converter_leaves_a_complete_export_or_none(
    killed: dict[str, dict[str, Any]], checkpoints: Path, tmp_path: Path, instant: str
) -> None:
    found = killed[instant]
    assert found["first"] in (0, None) and found["killed"] == -9, (
        "the converter was not killed at that instant"
    )
    is_visible = instant.startswith("replacing") or instant == "after the rename"
    assert found["seen"] == ("complete" if is_visible else "none")
    assert found["again"] == 0
    export = convert(ConvertSettings(str(checkpoints / CASE), str(tmp_path / "uninterrupted")))
    uninterrupted = atomic_dir.read_manifest(export)["files"]
    same = {name for name in uninterrupted if name != "README.md"}  # README.md contains the path of the run
    assert {name: found["files"][name] for name in same} == {name: uninterrupted[name] for name in same}
