"""How much a difference means: the half-width of each data set's intervals, and the pairs that are not told apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.report import format
from trainer.report.comparisons import Comparison
from trainer.report.methods import label
from trainer.report.statistics import wilson_interval
from trainer.report.summary import Cell, Panel

LEVEL = 0.05


@dataclass(frozen=True)
class Certainty:
    """`accuracy` is the best on the panel; half-widths are of 95 % Wilson intervals, as fractions."""

    panel: str
    n: int
    accuracy: float
    half_width: float
    worst_half_width: float  # at 50 %
    untold: tuple[str, ...]  # pairs of methods whose difference means little, in words
    num_pairs: int  # pairs that were tested

    def __str__(self) -> str:
        return (
            f"{self.panel}: with {self.n} problems {format.percent(self.accuracy, 0)} means ± "
            f"{100 * self.half_width:.1f} points at 95 % (± {100 * self.worst_half_width:.1f} at 50 %)."
        )


def half_width(accuracy: float, n: int) -> float:
    """Half the width of the 95 % Wilson interval."""
    low, high = wilson_interval(accuracy * n, n)
    return (high - low) / 2


def certainties(panels: Sequence[Panel], comparisons: Sequence[Comparison]) -> list[Certainty]:
    found = []
    for panel in panels:
        best = max((cell.estimate for cell in panel.cells), key=lambda estimate: estimate.mean)
        accuracy = min(best.mean, 1.0)
        pairs: dict[tuple[int, str, str, str], list[float]] = defaultdict(list)
        for c in comparisons:
            if c.panel == panel.title and c.p_holm is not None:
                pairs[c.num_parameters, c.model_name, c.first, c.second].append(c.p_holm)
        untold = [_in_words(panel, *pair, p) for pair, p in pairs.items() if max(p) >= LEVEL]
        widths = half_width(accuracy, best.n), half_width(0.5, best.n)
        found.append(Certainty(panel.title, best.n, accuracy, *widths, tuple(untold), len(pairs)))
    return found


def _in_words(panel: Panel, size: int, model: str, first: str, second: str, p: Sequence[float]) -> str:
    cells: dict[str, Cell] = {cell.method: cell for cell in panel.of_model((size, model))}
    means = [cells[method].estimate.mean for method in (first, second)]
    difference = f"{100 * abs(means[0] - means[1]):.1f} points"
    low, high = (format.p_value(value) for value in (min(p), max(p)))
    return f"{model}, {label(first)} and {label(second)}: {difference}, p (Holm) {low if low == high else f'{low} to {high}'}"
