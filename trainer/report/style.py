"""One look for every figure and the page: colours, markers, and matplotlib's settings.

The colours of known methods are Okabe and Ito's (2008), which stay apart for colour-blind readers, with a grey for the
baseline; markers differ as well. Figures are drawn in the light colours; on the page each becomes a CSS variable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from trainer.report.summary import method_rank

# name of the CSS variable -> (light, dark)
NEUTRALS = {
    "ink": ("#1c1f23", "#e6e4df"),
    "muted": ("#666c74", "#9a9da3"),
    "grid": ("#e4e5e7", "#33363b"),
    "paper": ("#fefefe", "#17191c"),
}
INK, MUTED, GRID, PAPER = (light for light, _ in NEUTRALS.values())


@dataclass(frozen=True)
class MethodStyle:
    color: str
    dark: str  # on the page in dark mode
    marker: str
    variable: str  # CSS


_KNOWN = {
    "answer_only": ("#767b82", "#a2a7ae", "o"),
    "cot": ("#0072b2", "#5bb4ea", "s"),
    "socratic": ("#d55e00", "#f28a3c", "D"),
    "solver": ("#009e73", "#3cc69d", "^"),
    "decomposer": ("#b8568f", "#e191bf", "v"),
    "decomposer_interleaved": ("#8a6d00", "#d9b93a", "P"),
}
_SPARE = (
    ("#332288", "#9f95e6", "X"),
    ("#117733", "#5fbf7c", "<"),
    ("#882255", "#d97ba6", ">"),
    ("#44aa99", "#74d0c1", "p"),
)

RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    # The first one comes with matplotlib: the layout is the same on every machine.
    "font.sans-serif": ["DejaVu Sans", "Helvetica Neue", "Arial", "sans-serif"],
    "font.size": 8.0,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "axes.labelcolor": MUTED,
    "axes.labelsize": 7.5,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.facecolor": "none",
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.size": 3.0,
    "xtick.major.width": 0.7,
    "ytick.major.size": 0.0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's own typeface
    "svg.hashsalt": "socratic-trainer",  # without it every build has other ids
    "path.simplify": True,
}


def method_styles(methods: Iterable[str]) -> dict[str, MethodStyle]:
    """A style for each method, the same in every figure; unknown methods share the spare colours in name order."""
    ordered = sorted(set(methods), key=method_rank)
    unknown = [method for method in ordered if method not in _KNOWN]
    styles = {}
    for index, method in enumerate(ordered):
        color, dark, marker = _KNOWN.get(method) or _SPARE[unknown.index(method) % len(_SPARE)]
        styles[method] = MethodStyle(color, dark, marker, f"method-{index}")
    return styles
