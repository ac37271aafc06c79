"""Write and parse docs/models.md."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence

import torch
import transformers

from tests.models.row import CRASH, FALLBACK, STAGES, WRONG, Cell, Row

_INTRODUCTION = """\
# Model families

<!-- Written by `make test-models`. Do not edit. -->

Every decoder-only family of transformers with a causal language model, and variants of it (a name behind a dash:
`-window` has a sliding window shorter than the examples). Each row is a tiny model with random weights in fp32, put
through the product's own code on a CPU and compared with plain transformers: one example at a time, its default attention.

| column | what is compared |
| --- | --- |
| training | loss and gradients of the layout that `--packing auto` chooses |
| padded | loss and gradients of the layout that `--packing false` chooses |
| evaluation | tokens of the backend that `--backend auto` chooses, against the model's own greedy `generate` |
| own cache | tokens of `--backend transformers` |
| export | a checkpoint in DeepSpeed's layout, converted and reloaded: every weight; names, shapes and dtypes against `save_pretrained` |

Equal means: the loss within 1e-5 and the gradients within 1e-4 of themselves (or four times what transformers' own fp32
gradients are off from those in fp64, where that is more), and every token the same. Where the reason says that `generate`
differs, the tokens are those of the plain forward pass over the whole text.

*ok*: equal, by the fastest way. *fallback*: equal, by the slower way that is named; the program says why. *refused*: an
error message with the reason. *crash*: a traceback. **WRONG**: other numbers without an error message.
"""


def summary(rows: Sequence[Row]) -> str:
    """Return the line with the counts of rows."""
    wrong, crashed = (sum(row.has(status) for row in rows) for status in (WRONG, CRASH))
    return (
        f"{len(rows)} rows: {sum(row.is_training_right for row in rows)} right in training, "
        f"{sum(row.is_evaluation_right for row in rows)} right in evaluation, "
        f"{sum(row.is_training_right and row.is_evaluation_right for row in rows)} in both, "
        f"{sum(row.is_fast for row in rows)} on both fast paths, {wrong} WRONG, {crashed} crash"
    )


def versions() -> str:
    """Return the versions of the libraries that determine the numbers."""
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def text(rows: Sequence[Row], excluded: Mapping[str, str]) -> str:
    """Return the page."""
    lines = [
        _INTRODUCTION,
        f"`make test-models` on {datetime.date.today()}, {versions()}.",
        "",
        f"**{summary(rows)}**",
        "",
        "| model | training | padded | evaluation | own cache | export | reason |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *map(_line, rows),
        "",
        "## Not in the table",
        "",
        "Types of transformers' registry of causal language models that are no decoder-only language model:",
        "",
    ]
    by_reason: dict[str, list[str]] = {}
    for name, reason in excluded.items():
        by_reason.setdefault(reason, []).append(name)
    lines += [f"- {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return "\n".join(lines) + "\n"


def parse(page: str) -> tuple[str, dict[str, list[str]]]:
    """Return the summary line of a page, and the cells of each row by its name (stages in order, then the reason)."""
    found = re.search(r"^\*\*(\d+ rows: .*)\*\*$", page, re.MULTILINE)
    table = page.partition("| --- | --- | --- | --- | --- | --- | --- |\n")[2].partition("\n\n")[0]
    rows = {}
    for line in table.splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        rows[name] = cells
    return found[1] if found else "", rows


def _line(row: Row) -> str:
    cells = [getattr(row, stage) for stage in STAGES]
    reasons: dict[str, list[str]] = {}
    for stage, cell in zip(("training", "padded", "evaluation", "own cache", "export"), cells, strict=True):
        if cell.reason:
            reasons.setdefault(_escape(cell.reason), []).append(stage)
    reason = "; ".join(f"{', '.join(stages)}: {reason}" for reason, stages in reasons.items())
    return " | ".join([f"| {row.name}", *map(_cell, cells), f"{reason} |"])


def _cell(cell: Cell) -> str:
    if cell.status == WRONG:
        return f"**WRONG** ({_escape(cell.detail)})"
    return f"fallback: {_escape(cell.detail)}" if cell.status == FALLBACK else cell.status


def _escape(text: str) -> str:
    text = re.sub(r"/tmp/\S*/", "", text.replace("\n", " "))
    return text.replace("|", "\\|")
