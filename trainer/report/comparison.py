"""Tables of all accuracies: a row per model, a column per method, and the paper's values below ours."""

from functools import cache
from importlib import resources
from typing import Any

import jinja2
import pandas as pd
import yaml

from trainer.report import format
from trainer.report.columns import to_dicts
from trainer.report.methods import PAIR_METHODS, label, method_order, without_guidance

# The source of a paper value for `socratic` does not say whether the value is for the unified or the iterative method,
# so the cell of the value spans both columns.
_UNIFIED_OR_ITERATIVE = "socratic"
_SAME_SIZE = 0.05  # relative tolerance; papers call GPT-2 medium (354,823,168 parameters) 345M or 355M
_ROW = ["problems", "who", "model", "parameters", "total_parameters", "method"]
_ROW += ["accuracy", "low", "high", "n", "seeds", "mark", "source", "inside_our_interval"]
_ESCAPES: dict[str, str | int | None] = {
    **{character: "\\" + character for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"–": "--", "±": r"$\pm$", "·": r"$\cdot$", "<": r"\textless{}", ">": r"\textgreater{}"},
}


@cache
def paper_values() -> dict[str, Any]:
    """Return the content of paper_values.yaml, a dict with the keys paper, url, marks, notes and values."""
    return yaml.safe_load((resources.files("trainer.report") / "paper_values.yaml").read_text("utf-8"))


def same_size(parameters: int, value: dict[str, Any]) -> bool:
    """Return whether `parameters` differs by at most 5 % from `value["parameters"]`, the size of the paper's model."""
    return abs(parameters - value["parameters"]) <= _SAME_SIZE * value["parameters"]


def paper_tables(evaluations: pd.DataFrame, summary: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table for each panel. Plain panels (see columns.RUNS) also have the paper's values for their data.

    A table is a dict: title; columns, a list of methods; marks, a dict mark -> meaning; rows, a list of dicts with the keys
    is_paper, model, parameters and cells. `cells` is a list of (number of spanned columns, rows of comparison_rows
    with is_best and accuracies of the summary).
    """
    panels = evaluations.drop_duplicates("panel")
    return [
        _table(summary[summary["panel"] == row.panel], row.data if row.is_plain else "")
        for row in panels.itertuples()
    ]


def comparison_rows(tables: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per accuracy in the tables, for CSV and JSON. Accuracies are fractions.

    In rows of the paper, `inside_our_interval` is True if the paper's value lies within the 95 % interval of a model of ours
    with the same size and method. It is None in our rows, if we have no such model, and for the method `socratic`.
    """
    return [
        {name: number[name] for name in _ROW}
        for table in tables
        for row in table["rows"]
        for _, cell in row["cells"]
        for number in cell
    ]


def _table(summary: pd.DataFrame, data: str) -> dict[str, Any]:
    """Return the table of a panel. `data`: data set of the paper values to show; "" to show no paper values."""
    title = summary["panel"].iat[0]
    values = [
        value | {"accuracy": round(value["accuracy"] / 100, 6), "who": "paper"}
        for value in paper_values()["values"]
        if value["data"] == data
    ]
    values = [value | {"inside_our_interval": _is_inside(value, summary)} for value in values]
    methods = sorted({*summary["method"], *(value["method"] for value in values)}, key=method_order)
    spans = dict.fromkeys(methods, 1)
    # A span covers neighbouring columns: those of the pairs follow `socratic` in display order.
    spans_of_paper = {name: 1 for name in methods if without_guidance(name) not in PAIR_METHODS}
    if _UNIFIED_OR_ITERATIVE in spans_of_paper:
        spans_of_paper[_UNIFIED_OR_ITERATIVE] += len(methods) - len(spans_of_paper)
    else:
        spans_of_paper = spans
    ours_long = summary.rename(columns={"mean": "accuracy", "num_seeds": "seeds"})
    ours_long = ours_long.assign(who="ours", mark="", source="", inside_our_interval=None)
    paper = pd.DataFrame(values, columns=_ROW).astype({"inside_our_interval": "object"})
    sizes = sorted(summary["parameters"].unique())
    rows = []
    for is_paper, numbers, columns in ((False, ours_long, spans), (True, paper, spans_of_paper)):
        numbers = numbers.assign(problems=title).reindex(columns=[*_ROW, "is_best", "accuracies"])
        for (size, model), of_model in numbers.groupby(["parameters", "model"]):
            cells = [(span, to_dicts(of_model[of_model["method"] == name])) for name, span in columns.items()]
            row = {"is_paper": is_paper, "model": model, "parameters": int(size), "cells": cells}
            # A row of the paper is placed below the row of our model of about the same size (the largest of several).
            near = [ours for ours in sizes if is_paper and same_size(ours, row)]
            rows.append((near[-1] if near else size, is_paper, row))
    rows.sort(key=lambda row: row[:2])
    used = {value["mark"] for value in values}
    return {
        "title": title,
        "columns": methods,
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
    """Return the text with LaTeX's special characters escaped. Other characters are kept, because LaTeX reads UTF-8."""
    return text.translate(str.maketrans(_ESCAPES))


def to_latex(tables: list[dict[str, Any]]) -> str:
    """Return LaTeX source with a table environment per panel. The document needs \\usepackage{booktabs}."""
    environment = jinja2.Environment(
        block_start_string="<%", block_end_string="%>", variable_start_string="<<", variable_end_string=">>",
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"latex": escape_latex, "count": format.count, "label": label}
    source = (resources.files("trainer.report") / "templates" / "comparison.tex.j2").read_text("utf-8")
    ours = [[cell for cell in comparison_rows([table]) if cell["who"] == "ours"] for table in tables]
    pairs = list(zip(tables, ours, strict=True))
    return environment.from_string(source).render(tables=pairs, paper=paper_values()["paper"])
