"""Every test that docs/faults.md names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY

PAGE = REPOSITORY / "docs" / "faults.md"
NAMED = sorted(set(re.findall(r"`(tests/[\w/.]+\.py(?:::\w+)?)`", PAGE.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("name", NAMED)
def test_what_the_table_names_exists(name: str) -> None:
    path, _, function = name.partition("::")
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert function in functions if function else functions


def test_every_test_of_this_folder_is_in_the_table() -> None:
    mine = {path.name for path in Path(__file__).parent.glob("test_*.py")} - {Path(__file__).name}
    assert mine <= {Path(name.partition("::")[0]).name for name in NAMED}
