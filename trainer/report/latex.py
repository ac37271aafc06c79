"""The comparison table for a paper: LaTeX with booktabs, ready for \\input."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.report import format
from trainer.report.comparison_table import Entry, Row, Table
from trainer.report.targets import load_targets

_SPECIAL = {
    **{character: "\\" + character for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"–": "--", "±": r"$\pm$", "·": r"$\cdot$", "<": r"\textless{}", ">": r"\textgreater{}"},
}


def escape(text: str) -> str:
    """Text that LaTeX prints as it is; characters outside of ASCII are left to its UTF-8 input."""
    return re.sub("[" + re.escape("".join(_SPECIAL)) + "]", lambda found: _SPECIAL[found[0]], text)


def to_latex(tables: Sequence[Table]) -> str:
    """One table environment for each panel. Needs \\usepackage{booktabs}."""
    return "% Made by Socratic Trainer. Needs \\usepackage{booktabs}.\n" + "\n".join(map(_table, tables))


def _table(table: Table) -> str:
    header = " & ".join(["model", "parameters", *(escape(text) for _, text in table.columns)])
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{lr{'r' * len(table.columns)}}}",
        r"\toprule",
    ]
    lines += [header + r" \\", r"\midrule", *map(_row, table.rows), r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\caption{{{_caption(table)}}}", r"\end{table}", ""]
    return "\n".join(lines)


def _row(row: Row) -> str:
    model = escape(row.model) if row.who == "ours" else rf"\quad\textit{{paper: {escape(row.model)}}}"
    return " & ".join([model, format.count(row.parameters), *map(_entry, row.entries)]) + r" \\"


def _entry(entry: Entry) -> str:
    if entry.cell is not None:
        found = entry.cell.estimate
        text = rf"{100 * found.mean:.1f} {{\scriptsize [{100 * found.low:.1f}, {100 * found.high:.1f}]}}"
    else:
        text = ", ".join(rf"{t.accuracy:g}$^{{{t.mark[0]}}}$" for t in entry.targets) or "--"
    return rf"\multicolumn{{{entry.span}}}{{c}}{{{text}}}" if entry.span > 1 else text


def _caption(table: Table) -> str:
    ns = sorted({entry.cell.estimate.n for row in table.rows for entry in row.entries if entry.cell})
    seeds = sorted(
        {entry.cell.estimate.num_seeds for row in table.rows for entry in row.entries if entry.cell}
    )
    said = [f"{table.title}: strict accuracy in percent, 95 % Wilson intervals"]
    said.append(f"n = {_range(ns)}, {_range(seeds)} seed{'s' if seeds[-1] > 1 else ''}.")
    text = escape(", ".join(said))
    if table.marks:
        marks = ", ".join(rf"$^{{{mark[0]}}}$ {escape(meaning)}" for mark, meaning in table.marks.items())
        text += rf" Values of {escape(load_targets().paper)}: {marks}."
    elsewhere = "; ".join(f"{t.model} {t.accuracy:g} % ({table.marks[t.mark]})" for t in table.elsewhere)
    return text + (f" Without a column: {escape(elsewhere)}." if elsewhere else "")


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]}–{values[-1]}"
