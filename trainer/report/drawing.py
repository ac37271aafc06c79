"""Colours, drawing functions that several figures share, and rendering to SVG and PNG.

The method `answer_only` is grey. `cot`, `socratic` and `iterative_ahead` have colours of Okabe and Ito (2008), which
colour-blind readers can distinguish. Each method also has a marker. Figures are drawn in the light colours. On the page,
CSS variables replace the colours, so that dark mode can change them. The same data always give identical files.
"""

import contextlib
import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from scipy.optimize import isotonic_regression

from trainer.report.format import count, shorten
from trainer.report.methods import DISPLAYED_METHODS, method_order
from trainer.report.statistics import Floats

# name of the CSS variable -> (colour in light mode, colour in dark mode)
NEUTRALS = {
    "ink": ("#1c1f23", "#e6e4df"),
    "muted": ("#666c74", "#9a9da3"),
    "grid": ("#e4e5e7", "#33363b"),
    "paper": ("#fefefe", "#17191c"),
}
GOOD = ("#1f7a55", "#6cc79c")  # colour of right answers on the page: (light, dark)
INK, MUTED, GRID, PAPER = (light for light, _ in NEUTRALS.values())
_SPARE = (
    ("#6699cc", "#94bce6", "h"),
    ("#999933", "#cfcf72", "d"),
    ("#661100", "#d48f7e", "*"),
    ("#aa4499", "#d88fcb", "8"),
)
# error type -> (colour in light mode, colour in dark mode). Right answers are pale, so that errors stand out.
_ERROR_TYPES = {
    "right": ("#cfd8d3", "#3c4742"),
    "subquestion": ("#7a5fae", "#a78fdb"),
    "operation": ("#c2503c", "#e07b66"),
    "arithmetic": ("#e3a733", "#e8bb5c"),
    "no_answer": ("#3f4954", "#c5ccd4"),
    "other": ("#a9b8c6", "#6d7d8d"),
}
_COLORS = {"text.color": INK, "grid.color": GRID}
_COLORS |= dict.fromkeys(("axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), MUTED)
_MAX_COLUMNS = 3
_MAX_WIDTH = 12.0  # inches, width of a whole figure
_DPI = 200
_TITLE_LENGTH = 46  # maximum number of characters of a panel's title
_NAME_LENGTH = 22  # maximum number of characters of a line's name, written to the right of the panel
_LABEL_GAP = 0.075  # minimum vertical distance between two names, as a fraction of the axes' height
_LOG_RATIO = 8  # an axis is logarithmic if the values span more than this factor
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


@dataclass(frozen=True)
class Style:
    """Colours and marker of a method or error type. `dark`: colour in dark mode. `variable`: name of the CSS variable."""

    color: str
    dark: str
    marker: str
    variable: str


Styles = dict[str, Style]


@dataclass(frozen=True)
class Panel:
    """One panel of a figure. `description` is a text for screen readers. `size` is (width, height) in inches."""

    description: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (3.7, 2.75)


def method_styles(methods: Iterable[str]) -> Styles:
    """Return {method: style} for all figures. Methods without a colour get the spare colours in display order."""
    looks = {name: method[2:] for name, method in DISPLAYED_METHODS.items() if method.color}
    ordered = sorted(set(methods), key=method_order)
    unknown = [name for name in ordered if name not in looks]
    looks |= {name: _SPARE[index % len(_SPARE)] for index, name in enumerate(unknown)}
    return {name: Style(*looks[name], f"method-{index}") for index, name in enumerate(ordered)}


def error_type_styles() -> Styles:
    """Return {error type: style}. Right answers count as an error type. The styles have no markers."""
    return {name: Style(light, dark, "", f"cause-{name}") for name, (light, dark) in _ERROR_TYPES.items()}


def figure_files(name: str, panels: Sequence[Panel]) -> dict[str, bytes]:
    """Return {file name: content} of an SVG and a PNG file, each with all panels in one grid."""
    fitting = int(_MAX_WIDTH / max(panel.size[0] for panel in panels))
    with _matplotlib(PAPER):
        figure = _draw(panels, max(1, min(_MAX_COLUMNS, len(panels), fitting)))
        png = io.BytesIO()
        svg = _svg(figure)
        figure.set_dpi(_DPI)
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    return {f"{name}.svg": svg, f"{name}.png": png.getvalue()}


def inline_panels(name: str, panels: Sequence[Panel], styles: Styles) -> list[str]:
    """Return each panel as an SVG element for the page, with CSS variables as colours and with unique ids."""
    with _matplotlib("none"):
        return [
            _for_page(_svg(_draw([panel], 1)), f"{name}-{index}", panel.description, styles)
            for index, panel in enumerate(panels)
        ]


def _svg(figure: Figure) -> bytes:
    svg = io.BytesIO()
    # Date and version are left out, so that two builds of the same study have the same bytes.
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    return svg.getvalue()


def _draw(panels: Sequence[Panel], columns: int) -> Figure:
    rows = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    heights = [max(panel.size[1] for panel in row) for row in rows]
    width = max(panel.size[0] for panel in panels) * columns
    layout = ConstrainedLayoutEngine(wspace=0.06, hspace=0.06)
    figure = Figure(figsize=(width, sum(heights)), layout=layout)
    grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
    for index, panel in enumerate(panels):
        panel.draw(figure.add_subplot(grid[divmod(index, columns)]))
    return figure


@contextlib.contextmanager
def _matplotlib(background: str) -> Iterator[None]:
    """Context manager that applies the settings of the figures and hides warnings about glyphs that their font lacks."""
    path = resources.files("trainer.report") / "templates" / "figures.mplstyle"
    style = matplotlib.rc_params_from_file(str(path), use_default_template=False)
    settings: Any = {**style, **_COLORS, "figure.facecolor": background, "savefig.facecolor": background}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _for_page(svg: bytes, prefix: str, description: str, styles: Styles) -> str:
    variables = {light: f"var(--{name})" for name, (light, _) in NEUTRALS.items()}
    variables |= {style.color: f"var(--{style.variable})" for style in styles.values()}
    colors = re.compile("|".join(map(re.escape, variables)))
    root = ElementTree.fromstring(svg)
    unneeded = (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style")
    for element in root.iter():
        element[:] = [child for child in element if child.tag not in unneeded]
        for name, value in element.items():
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
    root.attrib |= {"role": "img", "aria-label": description}
    return ElementTree.tostring(root, encoding="unicode")


def draw_points(axes: Axes, x: Sequence[float], cells: pd.DataFrame, style: Style) -> None:
    """Draw a line through the means, a bar per interval, and a dot per seed. `cells`: rows of statistics.estimates."""
    axes.plot(x, cells["mean"], color=style.color, linewidth=1.5, alpha=0.9, zorder=2)
    axes.vlines(x, cells["low"], cells["high"], color=style.color, linewidth=1.1, zorder=2)
    dots = np.concatenate(list(cells["accuracies"]))
    # A dot at 0 % lies on the axis, and clipping would cut the dot in half.
    draw_dots(axes, np.repeat(x, cells["num_seeds"]), dots, style, s=17, zorder=3, clip_on=False)


def draw_dots(axes: Axes, x: Any, y: Any, style: Style, **look: Any) -> None:
    """Draw a marker at each point (x, y), in the style of a method."""
    axes.scatter(x, y, marker=style.marker, color=style.color, edgecolors=PAPER, linewidths=0.6, **look)


def headings(axes: Axes, title: str, quantity: str) -> None:
    """Write the panel's title and, below it, the quantity of the vertical axis."""
    at: dict[str, Any] = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points"}
    at["annotation_clip"] = False
    # This blank reserves height for the title in matplotlib's layout. A long title in the layout would make the axes narrower.
    axes.annotate(" ", xytext=(0, 19), fontsize=9, **at)
    title = shorten(title, _TITLE_LENGTH)
    axes.annotate(title, xytext=(0, 19), fontsize=9, fontweight="bold", color=INK, **at).set_in_layout(False)
    axes.annotate(quantity, xytext=(0, 8), fontsize=7.5, color=MUTED, **at)


def percent_axis(axes: Axes, highest: float) -> None:
    """Set the vertical axis to percent, from 0 to a little above `highest`. If `highest` is near 100 %, end at 100 %."""
    top = max(0.05, 1.06 * highest)
    axes.set_ylim(0, 1.0 if top > 0.92 else top)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def parameters_axis(axes: Axes, sizes: Sequence[int], gap: float, **look: Any) -> None:
    """Set the ticks of the horizontal axis to model sizes that are at least `gap` apart in log(parameters)."""
    shown = select_spaced([math.log(max(size, 1)) for size in sizes], gap)
    axes.xaxis.set_major_locator(FixedLocator([sizes[index] for index in shown]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("parameters", loc="right", **look)


def value_axis(
    axes: Axes, name: str, low: float, high: float, linear: tuple[float, float], log_margin: float, bins: int
) -> None:
    """Set limits and ticks of axis `name` ("x" or "y") for values from `low` to `high`.

    The axis is logarithmic if the values are positive and span more than a factor of _LOG_RATIO. Its limits are then
    low / log_margin and high * log_margin. Otherwise, the axis is linear, with the limits `linear` and at most `bins`
    intervals between ticks.
    """
    axis = axes.xaxis if name == "x" else axes.yaxis
    if low > 0 and high / low > _LOG_RATIO:
        axes.set(**{f"{name}scale": "log", f"{name}lim": (low / log_margin, high * log_margin)})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
        axis.set_minor_locator(NullLocator())
    else:
        axes.set(**{f"{name}lim": linear})
        axis.set_major_locator(MaxNLocator(nbins=bins))


def label_lines(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write the names of lines to the right of the axes. Names that would overlap are moved apart.

    `ends` has (value at the end of the line, name, colour). The limits and scale of the axes must be final.
    """
    to_axes = axes.transScale + axes.transLimits
    heights = [float(to_axes.transform((1.0, value))[1]) for value, _, _ in ends]
    look: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "xytext": (5, 0)}
    look |= {"annotation_clip": False, "fontsize": 8, "fontweight": "bold", "va": "center"}
    for height, (_, text, color) in zip(dodge_labels(heights, _LABEL_GAP), ends, strict=True):
        axes.annotate(shorten(text, _NAME_LENGTH), xy=(1, height), color=color, **look)


def dodge_labels(heights: Sequence[float], gap: float) -> Floats:
    """Return heights that are moved apart until neighbours are at least `gap` apart.

    The order is kept, and the sum of squared movements is minimal, so a group of labels keeps its centre.
    """
    order = np.argsort(heights, kind="stable")
    ranks = gap * np.arange(len(heights))
    dodged = np.empty(len(heights))
    dodged[order] = isotonic_regression(np.array(heights)[order] - ranks).x + ranks
    return dodged


def select_spaced(positions: Sequence[float], gap: float) -> list[int]:
    """Return indices of `positions` (ascending) that are at least `gap` apart. The last position is always selected."""
    indices: list[int] = []
    for index in reversed(range(len(positions))):
        if not indices or positions[indices[-1]] - positions[index] >= gap:
            indices.append(index)
    return indices[::-1]


def bin_curve(x: Floats, y: Floats, num_bins: int) -> tuple[Floats, Floats]:
    """Return at most 2 * num_bins points of a curve: in each bin of consecutive points, those of smallest and largest y."""
    if len(x) <= 2 * num_bins:
        return x, y
    bins = np.array_split(np.arange(len(x)), num_bins)
    indices = np.unique(
        [members[extreme(y[members])] for members in bins for extreme in (np.argmin, np.argmax)]
    )
    return x[indices], y[indices]


def smooth(y: Floats, window: int) -> Floats:
    """Return the centred moving mean of `y` over `window` values. `window` is odd.

    Near the start, the window is narrower but still centred, because a training loss falls steeply there. Near the end,
    only the right half of the window is cut, because the mean over a narrow window would be noisy.
    """
    total = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    half = np.minimum(index, window // 2)
    first, last = index - half, np.minimum(index + half, len(y) - 1)
    return np.asarray((total[last + 1] - total[first]) / (last + 1 - first))
