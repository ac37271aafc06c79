"""One look for every figure and the page: colours, markers, and matplotlib's settings.

The colours of the methods that are compared most are Okabe and Ito's (2008), which stay apart for colour-blind readers,
with a grey for the baseline; markers differ as well. Figures are drawn in the light colours; on the page each becomes a CSS variable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from trainer.report.methods import method_rank

# name of the CSS variable -> (light, dark)
NEUTRALS = {
    "ink": ("#1c1f23", "#e6e4df"),
    "muted": ("#666c74", "#9a9da3"),
    "grid": ("#e4e5e7", "#33363b"),
    "paper": ("#fefefe", "#17191c"),
}
GOOD = ("#1f7a55", "#6cc79c")  # a right answer, on the page
INK, MUTED, GRID, PAPER = (light for light, _ in NEUTRALS.values())


@dataclass(frozen=True)
class MethodStyle:
    color: str
    dark: str  # on the page in dark mode
    marker: str
    variable: str  # CSS


_KNOWN = {
    "few_shot": ("#3b3178", "#a9a0ee", "X"),
    "answer_only": ("#767b82", "#a2a7ae", "o"),
    "cot": ("#0072b2", "#5bb4ea", "s"),
    "socratic": ("#d55e00", "#f28a3c", "D"),
    "iterative_ahead": ("#009e73", "#3cc69d", "^"),
    "iterative_interleaved": ("#b8568f", "#e191bf", "v"),
    "gold_subquestions": ("#8a6d00", "#d9b93a", "P"),
    "solver": ("#44aa99", "#74d0c1", "p"),
    "decomposer": ("#882255", "#d97ba6", ">"),
    "decomposer_interleaved": ("#117733", "#5fbf7c", "<"),
}
_SPARE = (
    ("#6699cc", "#94bce6", "h"),
    ("#999933", "#cfcf72", "d"),
    ("#661100", "#d48f7e", "*"),
    ("#aa4499", "#d88fcb", "8"),
)

# What went wrong: (light, dark), the right answers pale, so that the eye goes to the others.
_CAUSES = {
    "right": ("#cfd8d3", "#3c4742"),
    "subquestion": ("#7a5fae", "#a78fdb"),
    "operation": ("#c2503c", "#e07b66"),
    "arithmetic": ("#e3a733", "#e8bb5c"),
    "no_answer": ("#3f4954", "#c5ccd4"),
    "other": ("#a9b8c6", "#6d7d8d"),
}

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


def cause_styles() -> dict[str, MethodStyle]:
    """A style for right and for every cause of a wrong answer; bars have no markers."""
    return {name: MethodStyle(light, dark, "", f"cause-{name}") for name, (light, dark) in _CAUSES.items()}
