"""Results as a Markdown table, and the place for it in the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness import Result

START, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def markdown(results: list[Result], facts: dict[str, Any]) -> str:
    """One row a comparison: ours and every peer with the median of its rounds, the ratio to the best peer, the goal."""
    lines = [
        f"{facts['processor']}, {facts['cores']} cores, {facts['date']}, torch {facts['versions']['torch']}; "
        "medians of interleaved rounds, equality checked in each.",
        "",
        "| work | ours | peers | ratio to the best peer | goal |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in results:
        told = result.comparison
        peers = [one.name for one in told.contenders if one.peer]
        cells = [
            told.work,
            f"{_number(result.median(result.ours))} {told.unit}",
            "<br>".join(
                f"{name}: {_number(result.median(name))} ({result.ratio_to(name):.2f}x)" for name in peers
            )
            or "-",
            "-" if result.ratio is None else f"**{result.ratio:.2f}x**",
            _goal(result),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    notes = [
        f"- {result.comparison.work}: {result.comparison.notes}"
        for result in results
        if result.comparison.notes
    ]
    return "\n".join([*lines, *([""] if notes else []), *notes, ""])


def into_readme(readme: Path, text: str) -> None:
    """Replace what stands between the two marks. Raises ValueError if the README has none."""
    before, mark, rest = readme.read_text(encoding="utf-8").partition(START)
    _, end_mark, after = rest.partition(END)
    if not mark or not end_mark:
        raise ValueError(f"{readme}: no {START} ... {END}")
    readme.write_text(f"{before}{START}\n{text}{END}{after}", encoding="utf-8")


def _goal(result: Result) -> str:
    told, goals = result.comparison, []
    if told.goal is not None and result.ratio is not None:
        goals.append(f"{told.goal:g}x, {'met' if result.ratio >= told.goal else 'not met'}")
    if told.limit is not None:
        value = result.median(result.ours)
        met = value >= told.limit if told.higher_is_better else value <= told.limit
        sign = "at least" if told.higher_is_better else "at most"
        goals.append(f"{sign} {_number(told.limit)} {told.unit}, {'met' if met else 'not met'}")
    return "<br>".join(goals) or "-"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
