"""The table in the paper's form: a row per model, a column per method, the paper's values below ours."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from typing import Any

import jinja2
import pandas as pd
import yaml

from trainer.report import format
from trainer.report.columns import records
from trainer.report.methods import METHODS, PAIRS

_UNIFIED_OR_ITERATIVE = "socratic"  # a paper value of this method spans these columns
_SAME_SIZE = 0.05  # GPT-2 medium is called 345M, 355M and has 354,823,168 parameters
_NAMES = ["problems", "who", "model", "parameters", "total_parameters", "method"]
_NUMBERS = ["accuracy", "low", "high", "n", "seeds", "mark", "source", "inside_our_interval"]
_LATEX = {
    **{character: "\\" + character for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"–": "--", "±": r"$\pm$", "·": r"$\cdot$", "<": r"\textless{}", ">": r"\textgreater{}"},
}


@cache
def paper_values() -> dict[str, Any]:
    """Return paper_values.yaml: paper, url, marks, notes, values."""
    return yaml.safe_load((resources.files("trainer.report") / "paper_values.yaml").read_text("utf-8"))


def same_size(parameters: int, value: dict[str, Any]) -> bool:
    """Return whether a model of ours is as large as a paper value's."""
    return abs(parameters - value["parameters"]) <= _SAME_SIZE * value["parameters"]


def comparison_tables(evaluations: pd.DataFrame, summary: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table for each panel whose evaluations are plain (columns.RUNS), else for the first panel.

    Keys: title; columns, list of (method, header); marks, {mark that occurs: meaning}; rows, list of dict with
    is_paper, model, parameters and cells, list of (number of columns spanned, list of rows of comparison_rows).
    """
    firsts = evaluations.drop_duplicates("panel")
    chosen = firsts[firsts["is_plain"].astype(bool)]
    chosen = firsts[:1] if chosen.empty else chosen
    return [
        _table(summary[summary["panel"] == row.panel], row.data if row.is_plain else "")
        for row in chosen.itertuples()
    ]


def comparison_rows(tables: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per number for CSV and JSON, accuracies as fractions.

    `inside_our_interval`: whether the paper's value lies within the 95 % interval of our model of that size and
    method; None without such a model, or if the value may belong to several of our methods.
    """
    return [
        found for table in tables for row in table["rows"] for _, cells in row["cells"] for found in cells
    ]


def _table(summary: pd.DataFrame, data: str) -> dict[str, Any]:
    """`data`: name of the data set in the paper's values, "" for none of them."""
    title = str(summary["panel"].iat[0])
    values = [value for value in paper_values()["values"] if value["data"] == data]
    headers = {name: method.header for name, method in METHODS.items() if method.header}
    ours = set(summary["method"])
    methods = [name for name in headers if name in ours or name not in ("few_shot", *PAIRS)]
    if not set(methods) & set(PAIRS):  # the paper's table has this column, so ours has it even if it is empty
        methods.insert(methods.index("socratic") + 1, "iterative_interleaved")
    spans = {name: 1 for name in methods}
    spans_of_paper = {name: 1 for name in methods if name not in PAIRS}
    spans_of_paper[_UNIFIED_OR_ITERATIVE] += len(methods) - len(spans_of_paper)

    ours_long = summary.rename(columns={"mean": "accuracy", "num_seeds": "seeds"})
    ours_long = ours_long.assign(who="ours", mark="", source="", inside_our_interval=None)
    values = [value | {"accuracy": round(value["accuracy"] / 100, 6)} for value in values]
    paper = pd.DataFrame(values, columns=["model", "parameters", "method", "accuracy", "mark", "source"])
    inside = pd.Series([_is_inside(value, summary) for value in values], dtype=object)
    paper = paper.assign(who="paper", inside_our_interval=inside)
    sizes = sorted(summary["parameters"].unique())
    rows = []
    for who, long, columns in (("ours", ours_long, spans), ("paper", paper, spans_of_paper)):
        long = long.assign(problems=title).reindex(columns=[*_NAMES, *_NUMBERS])
        for (size, model), found in long.groupby(["parameters", "model"]):
            cells = [(span, records(found[found["method"] == name])) for name, span in columns.items()]
            row = {"is_paper": who == "paper", "model": model, "parameters": int(size), "cells": cells}
            near = [ours for ours in sizes if row["is_paper"] and same_size(ours, row)]
            rows.append((near[-1] if near else size, row["is_paper"], row))  # below our model of that size
    rows.sort(key=lambda row: row[:2])
    used = {value["mark"] for value in values}
    return {
        "title": title,
        "columns": [(name, headers[name]) for name in methods],
        "rows": [row for *_, row in rows],
        "marks": {mark: text for mark, text in paper_values()["marks"].items() if mark in used},
    }


def _is_inside(value: dict[str, Any], summary: pd.DataFrame) -> bool | None:
    ours = summary[summary["method"] == value["method"]]
    ours = ours[[same_size(size, value) for size in ours["parameters"]]]
    if ours.empty or value["method"] == _UNIFIED_OR_ITERATIVE:
        return None
    return bool(((ours["low"] <= value["accuracy"]) & (value["accuracy"] <= ours["high"])).any())


def escape_latex(text: str) -> str:
    """Return LaTeX source that prints the text; characters outside of ASCII are left to LaTeX's UTF-8 input."""
    return re.sub("[" + re.escape("".join(_LATEX)) + "]", lambda found: _LATEX[found[0]], text)


def to_latex(tables: list[dict[str, Any]]) -> str:
    """Return one table environment per panel, ready for \\input. Needs \\usepackage{booktabs}."""
    environment = jinja2.Environment(
        block_start_string="<%", block_end_string="%>", variable_start_string="<<", variable_end_string=">>",
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"latex": escape_latex, "count": format.count, "range": _range}
    source = (resources.files("trainer.report") / "templates" / "comparison.tex.j2").read_text("utf-8")
    ours = [[cell for cell in comparison_rows([table]) if cell["who"] == "ours"] for table in tables]
    return environment.from_string(source).render(
        tables=list(zip(tables, ours, strict=True)), paper=paper_values()["paper"]
    )


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(high) if low == high else f"{low}–{high}"
