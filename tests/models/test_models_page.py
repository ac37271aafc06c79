"""docs/models.md was made with the pinned transformers and these families, and its summary matches its rows."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

from tests.models.families import excluded, names
from tests.models.models_page import parse, summary, text
from tests.models.row import CRASH, FALLBACK, OK, REFUSED, STAGES, WRONG, Cell, Row

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "models.md").read_text(encoding="utf-8")


def row_of(name: str, cells: list[str]) -> Row:
    """Return the row that a line of the page shows."""
    row = Row(name, "")
    for stage, cell in zip(STAGES, cells, strict=False):
        status = WRONG if cell.startswith("**WRONG**") else cell.partition(":")[0]
        assert status in (OK, FALLBACK, REFUSED, CRASH, WRONG), cell
        setattr(row, stage, Cell(status))
    return row


def test_it_was_made_with_the_pinned_transformers() -> None:
    found = re.search(r"^`make test-models` on .*transformers (\S+), torch", PAGE, re.MULTILINE)
    pinned = re.search(r"^transformers==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert found and pinned
    assert found[1] == pinned[1] == transformers.__version__, "run `make test-models`"


def test_its_summary_counts_its_rows() -> None:
    line, rows = parse(PAGE)
    assert list(rows) == names(), "run `make test-models`"
    assert line == summary([row_of(name, cells) for name, cells in rows.items()])


def test_no_family_is_wrong_or_crashes_and_most_are_fast() -> None:
    rows = [row_of(name, cells) for name, cells in parse(PAGE)[1].items()]
    assert not [row.name for row in rows if row.has(WRONG) or row.has(CRASH)]
    assert sum(row.is_training_right and row.is_evaluation_right for row in rows) >= 130
    assert sum(row.is_fast for row in rows) >= 95


def test_every_cell_that_is_not_ok_has_a_reason() -> None:
    for name, cells in parse(PAGE)[1].items():
        for cell, heading in zip(
            cells, ("training", "padded", "evaluation", "own cache", "export"), strict=False
        ):
            if cell == REFUSED or (cell.startswith(FALLBACK) and heading != "own cache"):
                assert heading in cells[-1], (name, heading)


def test_excluded_types_are_named_with_their_reasons() -> None:
    for name, reason in excluded().items():
        line = next(
            line for line in PAGE.splitlines() if line.startswith("- ") and line.endswith(f": {reason}")
        )
        assert name in line[2 : -len(reason) - 2].split(", ")


def test_parse_returns_the_written_page() -> None:
    rows = [
        Row("a", "a", *[Cell(OK)] * 5),
        Row("b-window", "b", Cell(FALLBACK, "padded", "a | b\nc"), Cell(OK), Cell(WRONG, "slots"), Cell(OK), Cell(CRASH, "", "x")),
        Row("c", "c", *[Cell(REFUSED, reason="/tmp/tmpabc/model: no")] * 5),
    ]  # fmt: skip
    page = text(rows, {"bert": "an encoder"})
    line, cells = parse(page)
    assert (
        line
        == summary(rows)
        == (
            "3 rows: 2 right in training, 1 right in evaluation, 1 in both, 1 on both fast paths, 1 WRONG, 1 crash"
        )
    )
    assert line == summary([row_of(name, found) for name, found in cells.items()])
    assert cells["b-window"][:5] == ["fallback: padded", "ok", "**WRONG** (slots)", "ok", "crash"]
    assert "/tmp" not in page
