"""Marks that several figures share: points with intervals, headings, axes in percent, labels at the end of lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from trainer.report.format import shorten
from trainer.report.metrics import Floats
from trainer.report.style import INK, MUTED, PAPER, MethodStyle
from trainer.report.summary import Estimate

_TITLE_LENGTH = 46  # characters that fit above a panel
_NAME_LENGTH = 22  # characters beside one
_LABEL_GAP = 0.075  # of the axes' height, between two lines of text


def draw_points(
    axes: Axes,
    x: Sequence[float],
    estimates: Sequence[Estimate],
    seeds: Sequence[Sequence[float]],
    style: MethodStyle,
) -> None:
    """A line through the means, a bar over each interval, and a dot for every seed."""
    axes.plot(x, [e.mean for e in estimates], color=style.color, linewidth=1.5, alpha=0.9, zorder=2)
    axes.vlines(
        x, [e.low for e in estimates], [e.high for e in estimates], color=style.color, linewidth=1.1, zorder=2
    )
    dots = [(place, value) for place, values in zip(x, seeds, strict=True) for value in values]
    axes.scatter(
        [place for place, _ in dots],
        [value for _, value in dots],
        s=17,
        marker=style.marker,
        color=style.color,
        edgecolors=PAPER,
        linewidths=0.6,
        zorder=3,
        clip_on=False,  # a dot at 0 % stands on the axis
    )


def headings(axes: Axes, title: str, quantity: str) -> None:
    """The panel's title and, below it instead of turned at the side, what the vertical axis measures."""
    at: dict[str, Any] = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points"}
    # The layout keeps the title's height free; by its width, a long one would squeeze the axes to nothing.
    axes.annotate(" ", xytext=(0, 19), fontsize=9, annotation_clip=False, **at)
    text = axes.annotate(
        shorten(title, _TITLE_LENGTH),
        xytext=(0, 19),
        fontsize=9,
        fontweight="bold",
        color=INK,
        annotation_clip=False,
        **at,
    )
    text.set_in_layout(False)
    axes.annotate(quantity, xytext=(0, 8), fontsize=7.5, color=MUTED, annotation_clip=False, **at)


def percent_axis(axes: Axes, highest: float) -> None:
    """From 0 to a little above the highest value, or to 100 % if it is close, in percent."""
    top = max(0.05, 1.06 * highest)
    top = 1.0 if top > 0.92 else top
    axes.set_ylim(0, top)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def label_lines(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name lines right of the axes: (value at the end of the line, text, colour), moved apart where they collide.

    The limits and scale of the axes must be final.
    """
    if not ends:
        return
    wanted = [axes.transLimits.transform(axes.transScale.transform((1.0, value)))[1] for value, _, _ in ends]
    for height, (_, text, color) in zip(spread([float(h) for h in wanted], _LABEL_GAP), ends, strict=True):
        axes.annotate(
            shorten(text, _NAME_LENGTH),
            xy=(1, height),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            color=color,
            fontsize=8,
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights apart until neighbours are `gap` from each other, keeping their order and groups' centres."""
    groups: list[tuple[float, list[int]]] = []  # centre, members from low to high
    for index in sorted(range(len(heights)), key=lambda i: heights[i]):
        centre, members = heights[index], [index]
        while groups and centre - gap * len(members) / 2 < groups[-1][0] + gap * len(groups[-1][1]) / 2:
            below, before = groups.pop()
            total = len(before) + len(members)
            centre = (below * len(before) + centre * len(members)) / total
            members = before + members
        groups.append((centre, members))
    placed = [0.0] * len(heights)
    for centre, members in groups:
        for rank, index in enumerate(members):
            placed[index] = centre + gap * (rank - (len(members) - 1) / 2)
    return placed


def apart(places: Sequence[float], gap: float) -> list[int]:
    """Indices of ascending places at least `gap` apart, the last one always among them: ticks that can be read."""
    kept: list[int] = []
    for index in reversed(range(len(places))):
        if not kept or places[kept[-1]] - places[index] >= gap:
            kept.append(index)
    return kept[::-1]


def thin(x: Floats, y: Floats, num_bins: int) -> tuple[Floats, Floats]:
    """At most 2 * num_bins points: the smallest and the largest y of each bin, in the order they occur."""
    if len(x) <= 2 * num_bins:
        return x, y
    kept: list[int] = []
    for members in np.array_split(np.arange(len(x)), num_bins):
        kept += sorted({int(members[np.argmin(y[members])]), int(members[np.argmax(y[members])])})
    return x[kept], y[kept]


def smooth(y: Floats, window: int) -> Floats:
    """Moving mean over `window` values (odd), centred.

    Near the start it is narrower and still centred, for the loss falls steeply there; at the end it is one-sided
    instead, for a narrow window would end the curve in the noise of a single step.
    """
    total = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    half = np.minimum(index, window // 2)
    first, last = index - half, np.minimum(index + half, len(y) - 1)
    return np.asarray((total[last + 1] - total[first]) / (last + 1 - first))
