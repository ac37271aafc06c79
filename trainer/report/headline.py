"""The result in a sentence, computed from the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.report import format
from trainer.report.methods import label
from trainer.report.summary import Cell, Panel

_MANY_PROBLEMS = 1000  # from here on a digit after the point means something
_MOST_NAMED = 3  # pairs of methods; more of them nobody reads


@dataclass(frozen=True)
class Headline:
    """`lead` method accuracy, method accuracy, ... `tail`. `verdict`: which intervals overlap."""

    lead: str
    findings: list[tuple[str, str, str]]  # method, accuracy, interval; best first
    tail: str
    verdict: str

    def __str__(self) -> str:
        findings = ", ".join(
            f"{label(method)} {accuracy} {interval}" for method, accuracy, interval in self.findings
        )
        return f"{self.lead} {findings} {self.tail}. {self.verdict}".strip()


def headline(panel: Panel) -> Headline:
    """The largest model of a panel; among models, one that several methods share goes before a larger lonely one."""
    shared = [model for model in panel.models if len(panel.of_model(model)) > 1]
    size, model = (shared or panel.models)[-1]
    cells = sorted(panel.of_model((size, model)), key=lambda cell: -cell.estimate.mean)
    ns = sorted({cell.estimate.n for cell in cells})
    digits = 1 if ns[0] >= _MANY_PROBLEMS else 0
    findings = [
        (
            cell.method,
            format.percent(cell.estimate.mean, digits),
            format.interval(cell.estimate.low, cell.estimate.high, digits),
        )
        for cell in cells
    ]
    seeds = max(cell.estimate.num_seeds for cell in cells)
    n = f"n = {ns[0]}" if len(ns) == 1 else f"n = {ns[0]} to {ns[-1]}"
    tail = f"({n}{f', mean of {seeds} seeds' if seeds > 1 else ''})"
    lead = f"On {panel.title}, with {format.count(size)} parameters:"
    return Headline(lead, findings, tail, _verdict(cells))


def _verdict(cells: Sequence[Cell]) -> str:
    pairs = list(itertools.combinations(cells, 2))
    overlapping = [(label(a.method), label(b.method)) for a, b in pairs if a.estimate.overlaps(b.estimate)]
    if not pairs:
        return ""
    if len(pairs) == 1:
        return f"The two 95 % intervals {'overlap' if overlapping else 'do not overlap'}."
    if not overlapping:
        return "No two of the 95 % intervals overlap."
    if len(overlapping) == len(pairs):
        return "All of the 95 % intervals overlap one another."
    if len(overlapping) > _MOST_NAMED:
        return f"{len(overlapping)} of the {len(pairs)} pairs of 95 % intervals overlap."
    named = ", and of ".join(f"{a} and {b}" for a, b in overlapping)
    return f"The 95 % intervals of {named} overlap; no others do."
