"""The look of every figure, marks that several figures share, and rendering to SVG and PNG.

The colours of the methods that are compared most are Okabe and Ito's (2008), which colour-blind readers can separate,
with a grey for the baseline; markers differ as well. Figures are drawn in the light colours; on the page each becomes
a CSS variable. The same data give the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from trainer.report.format import count, shorten
from trainer.report.methods import method_rank
from trainer.report.statistics import Floats

# name of the CSS variable -> (light, dark)
NEUTRALS = {
    "ink": ("#1c1f23", "#e6e4df"),
    "muted": ("#666c74", "#9a9da3"),
    "grid": ("#e4e5e7", "#33363b"),
    "paper": ("#fefefe", "#17191c"),
}
GOOD = ("#1f7a55", "#6cc79c")  # a right answer, on the page
INK, MUTED, GRID, PAPER = (light for light, _ in NEUTRALS.values())
_METHODS = {
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
# (light, dark); right answers are pale, so that the errors stand out.
_ERROR_TYPES = {
    "right": ("#cfd8d3", "#3c4742"),
    "subquestion": ("#7a5fae", "#a78fdb"),
    "operation": ("#c2503c", "#e07b66"),
    "arithmetic": ("#e3a733", "#e8bb5c"),
    "no_answer": ("#3f4954", "#c5ccd4"),
    "other": ("#a9b8c6", "#6d7d8d"),
}
_RC: dict[Any, Any] = {
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
_MAX_COLUMNS = 3
_MAX_WIDTH = 12.0  # inches of a whole figure
_DPI = 200
_TITLE_LENGTH = 46  # characters that fit above a panel
_NAME_LENGTH = 22  # characters beside one
_LABEL_GAP = 0.075  # of the axes' height, between two lines of text
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


@dataclass(frozen=True)
class Style:
    """Colours of a method or error type; `dark` is for dark mode, `variable` the name of the CSS variable."""

    color: str
    dark: str
    marker: str
    variable: str


Styles = dict[str, Style]


@dataclass(frozen=True)
class Panel:
    """One panel of a figure. `description` is for screen readers, `size` in inches."""

    description: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (3.7, 2.75)


def method_styles(methods: Iterable[str]) -> Styles:
    """Return a style per method, the same in every figure; unknown methods get spare colours in name order."""
    ordered = sorted(set(methods), key=method_rank)
    unknown = [method for method in ordered if method not in _METHODS]
    looks = [_METHODS.get(m) or _SPARE[unknown.index(m) % len(_SPARE)] for m in ordered]
    return {
        m: Style(*look, f"method-{index}") for index, (m, look) in enumerate(zip(ordered, looks, strict=True))
    }


def error_type_styles() -> Styles:
    """Return a style for right answers and for every error type; bars have no markers."""
    return {name: Style(light, dark, "", f"cause-{name}") for name, (light, dark) in _ERROR_TYPES.items()}


def figure_files(name: str, panels: Sequence[Panel]) -> dict[str, bytes]:
    """Return {file name: content}: all panels in one grid, as SVG and PNG."""
    fitting = int(_MAX_WIDTH / max(panel.size[0] for panel in panels))
    columns = max(1, min(_MAX_COLUMNS, len(panels), fitting))
    with _matplotlib(PAPER):
        canvas = _draw(panels, columns)
        png = io.BytesIO()
        svg = _svg(canvas)
        canvas.set_dpi(_DPI)
        FigureCanvasAgg(canvas).print_png(png, metadata={"Software": None})
    return {f"{name}.svg": svg, f"{name}.png": png.getvalue()}


def inline_panels(name: str, panels: Sequence[Panel], styles: Styles) -> list[str]:
    """Return each panel as an SVG element for the page: its colours are CSS variables, its ids are its own."""
    with _matplotlib("none"):
        return [
            _for_page(_svg(_draw([panel], 1)), f"{name}-{index}", panel.description, styles)
            for index, panel in enumerate(panels)
        ]


def _svg(canvas: Canvas) -> bytes:
    svg = io.BytesIO()
    # No date and no version: two builds of the same study are the same bytes.
    FigureCanvasSVG(canvas).print_svg(svg, metadata={"Date": None, "Creator": None})
    return svg.getvalue()


def _draw(panels: Sequence[Panel], columns: int) -> Canvas:
    rows = math.ceil(len(panels) / columns)
    width = max(panel.size[0] for panel in panels)
    heights = [max(p.size[1] for p in panels[row * columns : (row + 1) * columns]) for row in range(rows)]
    layout = ConstrainedLayoutEngine(wspace=0.06, hspace=0.06)
    canvas = Canvas(figsize=(width * columns, sum(heights)), layout=layout)
    grid = canvas.add_gridspec(rows, columns, height_ratios=heights)
    for index, panel in enumerate(panels):
        panel.draw(canvas.add_subplot(grid[divmod(index, columns)]))
    return canvas


@contextlib.contextmanager
def _matplotlib(background: str) -> Iterator[None]:
    """Context manager with our settings, and without warnings about glyphs that the font lacks and the page has."""
    settings = {**_RC, "figure.facecolor": background, "savefig.facecolor": background}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _for_page(svg: bytes, prefix: str, description: str, styles: Styles) -> str:
    variables = {light: f"var(--{name})" for name, (light, _) in NEUTRALS.items()}
    variables |= {style.color: f"var(--{style.variable})" for style in styles.values()}
    colors = re.compile("|".join(map(re.escape, variables)))
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name == "id":
                value = f"{prefix}-{value}"
            elif name == f"{{{_XLINK}}}href" and value.startswith("#"):
                value = f"#{prefix}-{value[1:]}"
            elif name in ("style", "clip-path"):
                value = _REFERENCE.sub(rf"url(#{prefix}-\1)", value)
                value = colors.sub(lambda match: variables[match[0]], value)
            element.set(name, value)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", description)
    return ElementTree.tostring(root, encoding="unicode")


def draw_points(axes: Axes, x: Sequence[float], cells: pd.DataFrame, style: Style) -> None:
    """Draw a line through the means, a bar over each interval, and a dot for every seed (statistics.estimates)."""
    axes.plot(x, cells["mean"], color=style.color, linewidth=1.5, alpha=0.9, zorder=2)
    axes.vlines(x, cells["low"], cells["high"], color=style.color, linewidth=1.1, zorder=2)
    dots = np.concatenate(list(cells["accuracies"]))
    # Not clipped: a dot at 0 % is on the axis.
    draw_dots(axes, np.repeat(x, cells["num_seeds"]), dots, style, s=17, zorder=3, clip_on=False)


def draw_dots(axes: Axes, x: Any, y: Any, style: Style, **look: Any) -> None:
    """Draw the markers of a method."""
    axes.scatter(x, y, marker=style.marker, color=style.color, edgecolors=PAPER, linewidths=0.6, **look)


def headings(axes: Axes, title: str, quantity: str) -> None:
    """Write the panel's title and, below it instead of turned at the side, the quantity of the vertical axis."""
    at: dict[str, Any] = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points"}
    at["annotation_clip"] = False
    # The layout keeps the title's height free; by its width, a long one would squeeze the axes to nothing.
    axes.annotate(" ", xytext=(0, 19), fontsize=9, **at)
    title = shorten(title, _TITLE_LENGTH)
    axes.annotate(title, xytext=(0, 19), fontsize=9, fontweight="bold", color=INK, **at).set_in_layout(False)
    axes.annotate(quantity, xytext=(0, 8), fontsize=7.5, color=MUTED, **at)


def percent_axis(axes: Axes, highest: float) -> None:
    """Set the vertical axis from 0 to a little above the highest value, or to 100 % if it is close, in percent."""
    top = max(0.05, 1.06 * highest)
    axes.set_ylim(0, 1.0 if top > 0.92 else top)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def parameters_axis(axes: Axes, sizes: Sequence[int], gap: float, **look: Any) -> None:
    """Set ticks at the model sizes, at least `gap` apart in log parameters."""
    shown = order_apart([math.log(max(size, 1)) for size in sizes], gap)
    axes.xaxis.set_major_locator(FixedLocator([sizes[index] for index in shown]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("parameters", loc="right", **look)


def log_axis(axis: Any, ratio: float) -> None:
    """Set the ticks of a log axis whose highest value is `ratio` times the lowest."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 300 else (1,)))


def label_lines(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name lines right of the axes: (value at the end of the line, text, colour), moved apart where they collide.

    The limits and scale of the axes must be final.
    """
    to_axes = axes.transScale + axes.transLimits
    wanted = [float(to_axes.transform((1.0, value))[1]) for value, _, _ in ends]
    look: dict[str, Any] = {
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "annotation_clip": False,
    }
    look |= {"fontsize": 8, "fontweight": "bold", "va": "center"}
    for height, (_, text, color) in zip(dodge_labels(wanted, _LABEL_GAP), ends, strict=True):
        axes.annotate(shorten(text, _NAME_LENGTH), xy=(1, height), xytext=(5, 0), color=color, **look)


def dodge_labels(heights: Sequence[float], gap: float) -> list[float]:
    """Return heights moved apart until neighbours are `gap` from each other; order and groups' centres stay."""
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


def order_apart(positions: Sequence[float], gap: float) -> list[int]:
    """Return indices of ascending positions at least `gap` apart, always with the last one: ticks that can be read."""
    kept: list[int] = []
    for index in reversed(range(len(positions))):
        if not kept or positions[kept[-1]] - positions[index] >= gap:
            kept.append(index)
    return kept[::-1]


def bin_curve(x: Floats, y: Floats, num_bins: int) -> tuple[Floats, Floats]:
    """Return at most 2 * num_bins points: the smallest and the largest y of each bin, in the order they occur."""
    if len(x) <= 2 * num_bins:
        return x, y
    kept: list[int] = []
    for members in np.array_split(np.arange(len(x)), num_bins):
        kept += sorted({int(members[np.argmin(y[members])]), int(members[np.argmax(y[members])])})
    return x[kept], y[kept]


def smooth(y: Floats, window: int) -> Floats:
    """Return the moving mean over `window` values (odd), centred.

    Near the start it is narrower and still centred, because the loss falls steeply there; at the end it is one-sided,
    because a narrow window would end the curve in the noise of a single step.
    """
    total = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    half = np.minimum(index, window // 2)
    first, last = index - half, np.minimum(index + half, len(y) - 1)
    return np.asarray((total[last + 1] - total[first]) / (last + 1 - first))
