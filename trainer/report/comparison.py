"""The table in the paper's form: models down, ways of teaching across, the paper's values beside ours."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import pandas as pd
import yaml

from trainer.report import format
from trainer.report.columns import records
from trainer.report.methods import PAIRS

_HEADERS = {
    "few_shot": "few-shot",
    "answer_only": "answer only",
    "cot": "CoT",
    "socratic": "Socratic unified",
    "iterative_ahead": "Socratic iterative, ahead",
    "iterative_interleaved": "Socratic iterative, interleaved",
    "gold_subquestions": "with gold sub-questions",
}
_UNIFIED_OR_ITERATIVE = "socratic"  # a paper value of this method is shown across these columns
_SAME_SIZE = 0.05  # GPT-2 medium is called 345M, 355M and has 354,823,168 parameters
_LATEX = {
    **{character: "\\" + character for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"–": "--", "±": r"$\pm$", "·": r"$\cdot$", "<": r"\textless{}", ">": r"\textgreater{}"},
}


@dataclass(frozen=True)
class ComparisonTable:
    """One panel's table.

    columns: (method, header). rows: dicts of who ("ours" or "paper"), model, parameters and entries, each of which is
    (columns spanned, row of summary.summarise or None, paper values). marks: those that occur, with their meaning.
    """

    title: str
    columns: list[tuple[str, str]]
    rows: list[dict[str, Any]]
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def cells(self) -> list[dict[str, Any]]:
        """Return our rows of the summary that are in the table."""
        return [cell for row in self.rows for _, cell, _ in row["entries"] if cell]


@cache
def paper_values() -> dict[str, Any]:
    """Return paper_values.yaml: paper, url, marks, notes, values."""
    text = (resources.files("trainer.report") / "paper_values.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def same_size(parameters: int, value: dict[str, Any]) -> bool:
    """Return whether a model of ours is as large as a paper value's."""
    return abs(parameters - value["parameters"]) <= _SAME_SIZE * value["parameters"]


def comparison_tables(evaluations: pd.DataFrame, summary: pd.DataFrame) -> list[ComparisonTable]:
    """Return a table for each panel whose evaluations are plain (columns.RUNS), else for the first panel."""
    firsts = evaluations.drop_duplicates("panel").set_index("panel")
    chosen = firsts[firsts["is_plain"].astype(bool)]
    chosen = firsts[:1] if chosen.empty else chosen
    cells = dict(list(summary.groupby("panel", sort=False)))
    return [
        _table(str(title), cells[title], row.data if row.is_plain else "")
        for title, row in zip(chosen.index, chosen.itertuples(), strict=True)
    ]


def _table(title: str, cells: pd.DataFrame, data: str) -> ComparisonTable:
    """`data`: name of the data set in the paper's values, "" for none of them."""
    values = [value for value in paper_values()["values"] if value["data"] == data]
    ours = set(cells["method"])
    methods = [m for m in _HEADERS if m in ours or m not in ("few_shot", *PAIRS)]
    if not set(methods) & set(PAIRS):  # the paper's form has the column even where we have nothing for it
        methods.insert(methods.index("socratic") + 1, "iterative_interleaved")
    rows = []
    for (size, model), found in cells.groupby(["parameters", "model"]):
        by_method = {cell["method"]: cell for cell in records(found)}
        entries: list[tuple[int, Any, list[Any]]] = [(1, by_method.get(method), []) for method in methods]
        rows.append({"who": "ours", "model": model, "parameters": int(size), "entries": entries})
    sizes = [row["parameters"] for row in rows]
    across = 1 + sum(method in PAIRS for method in methods)
    for size, model in dict.fromkeys((value["parameters"], value["model"]) for value in values):
        entries = [
            (
                across if method == _UNIFIED_OR_ITERATIVE else 1,
                None,
                [v for v in values if (v["parameters"], v["model"], v["method"]) == (size, model, method)],
            )
            for method in methods
            if method not in PAIRS  # spanned by the entry before
        ]
        rows.append({"who": "paper", "model": model, "parameters": size, "entries": entries})

    def position(row: dict[str, Any]) -> tuple[int, bool]:
        """By size; a row of the paper directly below our model of that size."""
        near = [size for size in sizes if row["who"] == "paper" and same_size(size, row)]
        return (near[-1] if near else row["parameters"]), row["who"] == "paper"

    marks = {
        mark: text for mark, text in paper_values()["marks"].items() if mark in {v["mark"] for v in values}
    }
    return ComparisonTable(title, [(m, _HEADERS[m]) for m in methods], sorted(rows, key=position), marks)


def comparison_rows(tables: list[ComparisonTable]) -> list[dict[str, Any]]:
    """Return a row per number for CSV and JSON, accuracies as fractions.

    `inside_our_interval`: whether the paper's value lies within the 95 % interval of our model of that size and
    method; None if we have none, or where it is not known which of our methods it belongs to.
    """
    rows = []
    for table in tables:
        for row in table.rows:
            names = {"problems": table.title, **{name: row[name] for name in ("who", "model", "parameters")}}
            for _, cell, values in row["entries"]:
                if cell:
                    numbers = {"accuracy": cell["mean"], "seeds": cell["num_seeds"], "mark": "", "source": ""}
                    rows.append(names | _numbers(**{**cell, **numbers}))
                for value in values:
                    accuracy = round(value["accuracy"] / 100, 6)
                    inside = _is_inside(accuracy, value, table)
                    paper = {**value, "accuracy": accuracy, "inside_our_interval": inside}
                    rows.append(names | _numbers(**paper))
    return rows


def _numbers(**found: Any) -> dict[str, Any]:
    columns = ("total_parameters", "method", "accuracy", "low", "high", "n", "seeds", "mark", "source")
    return {name: found.get(name) for name in (*columns, "inside_our_interval")}


def _is_inside(accuracy: float, value: dict[str, Any], table: ComparisonTable) -> bool | None:
    ours = [c for c in table.cells if same_size(c["parameters"], value) and c["method"] == value["method"]]
    if not ours or value["method"] == _UNIFIED_OR_ITERATIVE:
        return None
    return any(cell["low"] <= accuracy <= cell["high"] for cell in ours)


def escape_latex(text: str) -> str:
    """Return LaTeX source that prints the text as it is; characters outside of ASCII are left to its UTF-8 input."""
    return re.sub("[" + re.escape("".join(_LATEX)) + "]", lambda found: _LATEX[found[0]], text)


def to_latex(tables: list[ComparisonTable]) -> str:
    """Return one table environment per panel, ready for \\input. Needs \\usepackage{booktabs}."""
    return "% Made by Socratic Trainer. Needs \\usepackage{booktabs}.\n" + "\n".join(
        map(_latex_table, tables)
    )


def _latex_table(table: ComparisonTable) -> str:
    header = ["model", "parameters", *(escape_latex(text) for _, text in table.columns)]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{lr{'r' * len(table.columns)}}}",
        r"\toprule",
    ]
    lines += [" & ".join(header) + r" \\", r"\midrule"]
    for row in table.rows:
        model = escape_latex(row["model"])
        model = model if row["who"] == "ours" else rf"\quad\textit{{paper: {model}}}"
        entries = [_latex_entry(*entry) for entry in row["entries"]]
        lines.append(" & ".join([model, format.count(row["parameters"]), *entries]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{_caption(table)}}}", r"\end{table}", ""]
    return "\n".join(lines)


def _latex_entry(span: int, cell: dict[str, Any] | None, values: list[dict[str, Any]]) -> str:
    if cell:
        mean, low, high = (100 * cell[name] for name in ("mean", "low", "high"))
        return rf"{mean:.1f} {{\scriptsize [{low:.1f}, {high:.1f}]}}"
    text = ", ".join(rf"{value['accuracy']:g}$^{{{value['mark'][0]}}}$" for value in values) or "--"
    return rf"\multicolumn{{{span}}}{{c}}{{{text}}}" if span > 1 else text


def _caption(table: ComparisonTable) -> str:
    n, seeds = ({cell[name] for cell in table.cells} for name in ("n", "num_seeds"))
    text = escape_latex(
        f"{table.title}: strict accuracy in percent, 95 % Wilson intervals, n = {_range(n)}, "
        f"{_range(seeds)} seed{'s' if max(seeds) > 1 else ''}."
    )
    marks = ", ".join(rf"$^{{{mark[0]}}}$ {escape_latex(meaning)}" for mark, meaning in table.marks.items())
    return text + (rf" Values of {escape_latex(paper_values()['paper'])}: {marks}." if marks else "")


def _range(values: set[int]) -> str:
    return str(max(values)) if len(values) == 1 else f"{min(values)}–{max(values)}"
