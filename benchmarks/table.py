"""Results as a Markdown table, and its insertion into a document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

START, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return one line per comparison: medians of ours and of the peers, ratio to the best peer, goal.

    Numbered notes follow. Rows of another day than `facts` have their date. `rows`: from `Result.to_dict()`.
    """
    lines = [
        f"{facts['processor']}, {facts['cores']} cores, {facts['date']}, torch {facts['versions']['torch']}; "
        "medians of interleaved rounds, equality checked in each.",
        "",
        "| work | ours | peers | ratio to the best peer | goal |",
        "| --- | --- | --- | --- | --- |",
    ]
    notes = list(dict.fromkeys(row["notes"] for row in rows if row["notes"]))
    for row in rows:
        medians, ratios = row["medians"], row["ratios"]
        peers = [f"{name}: {number(medians[name])} ({ratio:.2f}x)" for name, ratio in ratios.items()]
        best = row["ratio_to_best_peer"]
        cells = [
            row["work"] + _day(row, facts) + (f" ({1 + notes.index(row['notes'])})" if row["notes"] else ""),
            f"{number(medians[ours_of(row)])} {row['unit']}",
            "<br>".join(peers) or "-",
            "-" if best is None else f"**{best:.2f}x**",
            _goal(row),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    numbered = [f"{count}. {note}" for count, note in enumerate(notes, 1)]
    return "\n".join([*lines, *([""] if notes else []), *numbered, ""])


def into_readme(readme: Path, text: str) -> None:
    """Replace the text between the two marks. Raises ValueError if a mark is missing."""
    before, mark, rest = readme.read_text(encoding="utf-8").partition(START)
    _, end_mark, after = rest.partition(END)
    if not mark or not end_mark:
        raise ValueError(f"{readme}: no {START} ... {END}")
    readme.write_text(f"{before}{START}\n{text}{END}{after}", encoding="utf-8")


def _day(row: dict[str, Any], facts: dict[str, Any]) -> str:
    date = row.get("date", facts["date"])
    return "" if date == facts["date"] else f", on {date}"


def _goal(row: dict[str, Any]) -> str:
    goals, ratio, value = [], row["ratio_to_best_peer"], row["medians"][ours_of(row)]
    if row["goal"] is not None and ratio is not None:
        goals.append(f"{row['goal']:g}x, {'met' if ratio >= row['goal'] else 'not met'}")
    if row["limit"] is not None:
        met = value >= row["limit"] if row["higher_is_better"] else value <= row["limit"]
        sign = "at least" if row["higher_is_better"] else "at most"
        goals.append(f"{sign} {number(row['limit'])} {row['unit']}, {'met' if met else 'not met'}")
    return "<br>".join(goals) or "-"


def ours_of(row: dict[str, Any]) -> str:
    """Return the name of the contender that is no peer."""
    return next(name for name in row["medians"] if name not in row["ratios"])


def number(value: float) -> str:
    """Format with three digits, or as a whole number from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
