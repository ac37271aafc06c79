"""The table in the paper's form: models down, ways of teaching across, the paper's values beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.report.methods import PAIRS
from trainer.report.summary import Cell, Panel
from trainer.report.targets import Target, load_targets, same_size

_HEADERS = {
    "few_shot": "few-shot",
    "answer_only": "answer only",
    "cot": "CoT",
    "socratic": "Socratic unified",
    "iterative_ahead": "Socratic iterative, ahead",
    "iterative_interleaved": "Socratic iterative, interleaved",
    "gold_subquestions": "with gold sub-questions",
}
_UNIFIED_OR_ITERATIVE = "socratic"  # a target of this method stands across these columns


@dataclass(frozen=True)
class Entry:
    """What stands in one place of a row. `span`: columns it reaches over. Ours has a cell, the paper's targets."""

    span: int = 1
    cell: Cell | None = None
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True)
class Row:
    who: str  # ours or paper
    model: str
    parameters: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Table:
    """One panel's table. `elsewhere`: targets whose method has no column."""

    title: str
    columns: tuple[tuple[str, str], ...]  # (method, header)
    rows: tuple[Row, ...]
    elsewhere: tuple[Target, ...] = ()
    marks: dict[str, str] = field(default_factory=dict)  # those that occur, with their meaning


def comparison_tables(panels: Sequence[Panel]) -> list[Table]:
    """A table for each panel that may stand beside the paper (`Panel.plain`), else for the first panel."""
    chosen = [panel for panel in panels if panel.plain] or list(panels[:1])
    return [_table(panel) for panel in chosen]


def _table(panel: Panel) -> Table:
    targets = load_targets().of_data(panel.data) if panel.plain else []
    methods = [m for m in _HEADERS if m in panel.methods or m not in ("few_shot", *PAIRS)]
    if not set(methods) & set(PAIRS):  # the paper's form has the column even where we have nothing for it
        methods.insert(methods.index("socratic") + 1, "iterative_interleaved")
    columns = tuple((method, _HEADERS[method]) for method in methods)
    rows = [_our_row(panel, model, methods) for model in panel.models]
    sizes = dict.fromkeys((t.parameters, t.model) for t in targets if t.method)
    rows += [_paper_row(size, model, targets, methods) for size, model in sizes]
    ours = [size for size, _ in panel.models]

    def place(row: Row) -> tuple[int, bool]:
        """By size; a row of the paper directly below our model of that size."""
        if row.who == "ours":
            return row.parameters, False
        near = [size for size in ours if same_size(size, Target("", "", row.parameters, "", 0, "", ""))]
        return (near[-1] if near else row.parameters), True

    used = {target.mark for target in targets}
    return Table(
        panel.title,
        columns,
        tuple(sorted(rows, key=place)),
        tuple(target for target in targets if not target.method),
        {mark: meaning for mark, meaning in load_targets().marks.items() if mark in used},
    )


def _our_row(panel: Panel, model: tuple[int, str], methods: Sequence[str]) -> Row:
    cells = {cell.method: cell for cell in panel.of_model(model)}
    return Row("ours", model[1], model[0], tuple(Entry(cell=cells.get(method)) for method in methods))


def _paper_row(size: int, model: str, targets: Sequence[Target], methods: Sequence[str]) -> Row:
    entries = []
    for method in methods:
        if method in PAIRS:
            continue  # the entry before reaches over it
        span = 1 + sum(m in PAIRS for m in methods) if method == _UNIFIED_OR_ITERATIVE else 1
        found = tuple(t for t in targets if (t.parameters, t.model, t.method) == (size, model, method))
        entries.append(Entry(span, targets=found))
    return Row("paper", model, size, tuple(entries))


def comparison_rows(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """For CSV and JSON: a row for each number, accuracies as fractions.

    `inside_our_interval` says whether the paper's value lies within the 95 % interval of our model of that size and
    method; empty if we have none, or where it is not known which of our methods it belongs to.
    """
    rows = []
    for table in tables:
        for row in table.rows:
            names = {
                "problems": table.title,
                "who": row.who,
                "model": row.model,
                "parameters": row.parameters,
            }
            for entry in row.entries:
                if entry.cell is not None:
                    rows.append(names | _ours(entry.cell))
                rows += [names | _papers(target, table) for target in entry.targets]
        rows += [
            {"problems": table.title, "who": "paper", "model": t.model, "parameters": t.parameters}
            | _papers(t, table)
            for t in table.elsewhere
        ]
    return rows


def _ours(cell: Cell) -> dict[str, Any]:
    found = cell.estimate
    numbers = {
        "accuracy": found.mean,
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "seeds": found.num_seeds,
    }
    texts: dict[str, Any] = {"mark": "", "source": "", "inside_our_interval": None}
    return {"total_parameters": cell.total_parameters, "method": cell.method} | numbers | texts


def _papers(target: Target, table: Table) -> dict[str, Any]:
    accuracy = round(target.accuracy / 100, 6)
    ours = [
        entry.cell.estimate
        for row in table.rows
        for entry in row.entries
        if entry.cell is not None and same_size(row.parameters, target) and entry.cell.method == target.method
    ]
    known = bool(ours) and target.method != _UNIFIED_OR_ITERATIVE
    return {
        **{"total_parameters": None, "method": target.method, "accuracy": accuracy},
        **dict.fromkeys(("low", "high", "n", "seeds")),
        **{"mark": target.mark, "source": target.source},
        "inside_our_interval": any(e.low <= accuracy <= e.high for e in ours) if known else None,
    }
