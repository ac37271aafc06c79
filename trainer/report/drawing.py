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
from dataclasses import dataclass, replace
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
from matplotlib.lines import Line2D
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
    ("#5585b8", "#94bce6", "h"),
    ("#87872a", "#cfcf72", "d"),
    ("#661100", "#d48f7e", "*"),
    ("#aa4499", "#d88fcb", "8"),
)
# error type -> (colour in light mode, colour in dark mode). Colour-blind readers can tell neighbours in a bar apart, too.
_ERROR_TYPES = {
    "right": ("#1b6a8c", "#5fb6dc"),
    "subquestion": ("#b084dc", "#7c58c4"),
    "copying": ("#e2a12c", "#e0a43a"),
    "operation": ("#c8452f", "#d9573f"),
    "arithmetic": ("#f0c9a0", "#f3d9a8"),
    "no_answer": ("#3a3330", "#8f8a85"),
    "other": ("#c4c7cb", "#50555b"),
}
_COLORS = {"text.color": INK, "grid.color": GRID}
_COLORS |= dict.fromkeys(("axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), MUTED)
_MAX_COLUMNS = 3
_MAX_WIDTH = 12.0  # inches, width of a whole figure
_DPI = 200
_NAME_LENGTH = 22  # maximum number of characters of a line's name, written to the right of the panel
NAME_FONT = "DejaVu Sans Mono"  # of the names of methods
_LABEL_GAP = 10.5  # minimum vertical distance between two names, in points
_FAR_END = (
    0.8  # a line that ends further left, as a fraction of the axes' width, has its name inside the axes
)
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
    """One panel of a figure. `description` is a text for screen readers. `size` is (width, height) in inches.

    `narrow`: size on narrow screens, if the panel would be too small there. `legend`: (name, style) of the lines or bars, drawn
    once per file; on the page it is HTML.
    """

    description: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (3.1, 2.5)
    narrow: tuple[float, float] | None = None
    legend: tuple[tuple[str, Style], ...] = ()


def method_styles(methods: Iterable[str]) -> Styles:
    """Return {method: style} for all figures. Methods without a colour get the spare colours in display order."""
    looks = {name: method[1:] for name, method in DISPLAYED_METHODS.items() if method.color}
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
    """Return each panel as SVG for the page, with CSS variables as colours and with unique ids.

    A panel with a narrow size is drawn twice, in elements of the classes `wide` and `narrow`.
    """
    texts = []
    with _matplotlib("none"):
        for index, panel in enumerate(panels):
            sizes = {"wide": panel.size, "narrow": panel.narrow} if panel.narrow else {"": panel.size}
            texts.append("")
            for kind, size in sizes.items():
                svg = _svg(_draw([replace(panel, size=size, legend=())], 1))
                texts[-1] += _for_page(svg, f"{name}-{index}{kind}", panel.description, styles, kind)
    return texts


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
    if legend := list(dict.fromkeys(entry for panel in panels for entry in panel.legend)):
        names, styles = zip(*legend, strict=True)
        keys = [
            Line2D([], [], color=style.color, marker=style.marker or "s", markersize=4.5, linewidth=1.4)
            for style in styles
        ]
        font = {"size": 8, "family": NAME_FONT if styles[0].marker else "DejaVu Sans"}
        look: dict[str, Any] = {"frameon": False, "handlelength": 1.4, "columnspacing": 1.4, "prop": font}
        columns = min(len(legend), int(width / 1.45))
        figure.legend(keys, names, loc="outside lower left", ncols=columns, **look)
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


def _for_page(svg: bytes, prefix: str, description: str, styles: Styles, kind: str) -> str:
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
    root.attrib |= {"role": "img", "aria-label": description, "class": kind}
    return ElementTree.tostring(root, encoding="unicode")


def draw_points(
    axes: Axes, x: Sequence[float], cells: pd.DataFrame, style: Style, has_line: bool = True
) -> None:
    """Draw a marker per mean, a bar per interval, a ring per seed if there are several, and a line through the means.

    `cells`: rows of statistics.estimates. Markers have no outline in another colour, because it would cut the bars.
    """
    if has_line:
        axes.plot(x, cells["mean"], color=style.color, linewidth=1.4, alpha=0.9, zorder=2)
    axes.vlines(x, cells["low"], cells["high"], color=style.color, linewidth=1.2, zorder=3)
    # A marker at 0 % lies on the axis, and clipping would cut the marker in half.
    look: dict[str, Any] = {"marker": style.marker, "edgecolors": style.color, "clip_on": False}
    axes.scatter(x, cells["mean"], color=style.color, s=22, linewidths=0, zorder=4, **look)
    several = (cells["num_seeds"] > 1).to_numpy()
    if several.any():
        rings = np.repeat(np.asarray(x)[several], cells["num_seeds"][several])
        accuracies = np.concatenate(list(cells["accuracies"][several]))
        axes.scatter(rings, accuracies, color="none", s=26, linewidths=0.8, zorder=4, **look)


def mark_groups(axes: Axes, bounds: Iterable[tuple[float, float]]) -> None:
    """Shade the part of the horizontal axis between each pair of bounds. Points side by side in it have one position."""
    for low, high in bounds:
        axes.axvspan(low, high, color=GRID, alpha=0.4, linewidth=0, zorder=0)


def headings(axes: Axes, title: str, quantity: str, left: float = 36) -> None:
    """Write the panel's title and, below it, the quantity of the axis, as long as they fit.

    `left`: width of the labels to the left of the axes, in points.
    """
    at: dict[str, Any] = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points"}
    at["annotation_clip"] = False
    # This blank reserves height for the title in matplotlib's layout. A long title in the layout would make the axes narrower.
    axes.annotate(" ", xytext=(0, 19), fontsize=9, **at)
    width = _panel_size(axes)[0] - left
    upper: dict[str, Any] = {"fontsize": 9, "color": INK, "fontweight": "bold", "xytext": (0, 19)}
    lower: dict[str, Any] = {"fontsize": 7.5, "color": MUTED, "xytext": (0, 8)}
    for text, look in ((title, upper), (quantity, lower)):
        fitting = shorten(text, int(width / (0.62 * look["fontsize"])))
        axes.annotate(fitting, **look, **at).set_in_layout(False)


def _panel_size(axes: Axes) -> Floats:
    """Return width and height of the panel of these axes, in points."""
    grid, figure = axes.get_subplotspec(), axes.get_figure(root=True)
    assert grid is not None and figure is not None
    return 72 * figure.get_size_inches() / (grid.get_gridspec().ncols, grid.get_gridspec().nrows)


def percent_axis(axes: Axes, highest: float) -> None:
    """Set the vertical axis to percent, from 0 to a little above `highest`. If `highest` is near 100 %, end at 100 %."""
    top = max(0.05, 1.06 * highest)
    axes.set_ylim(0, 1.0 if top > 0.92 else top)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def parameters_axis(axes: Axes, sizes: Sequence[int], gap: float) -> None:
    """Set the ticks of the horizontal axis to model sizes that are at least `gap` apart in log(parameters)."""
    shown = select_spaced([math.log(max(size, 1)) for size in sizes], gap)
    axes.xaxis.set_major_locator(FixedLocator([sizes[index] for index in shown]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("parameters of a model (logarithmic scale)", loc="right")


def loss_axis(axes: Axes, low: float, high: float) -> None:
    """Set limits and ticks of the vertical axis for losses from `low` to `high`: logarithmic beyond a factor of _LOG_RATIO."""
    if low > 0 and high / low > _LOG_RATIO:
        axes.set(yscale="log", ylim=(low / 1.15, high * 1.15))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(min(0.0, low), high * 1.05 or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def label_lines(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the names of lines at their ends. Names that would overlap are moved apart, and joined to their lines.

    `ends` has (x, y of the line's end, name, colour). The limits and scale of the axes must be final. The name of a line that
    ends early is written inside the axes.
    """
    to_axes = axes.transScale + axes.transLimits
    places = [tuple(map(float, to_axes.transform(end[:2]))) for end in ends]
    gap = _LABEL_GAP / (0.75 * _panel_size(axes)[1])  # the axes have about 75 % of the panel's height
    look: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "xytext": (5, 0)}
    look |= {"annotation_clip": False, "fontsize": 7.5, "fontweight": "bold", "va": "center", "zorder": 6}
    look["fontfamily"] = NAME_FONT
    inside: dict[str, Any] = {"facecolor": PAPER, "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
    joint: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False, "linewidth": 0.7, "alpha": 0.6}
    dodged = dodge_labels([y for _, y in places], gap)
    for y, (end_x, end_y), (*_, text, color) in zip(dodged, places, ends, strict=True):
        x = end_x if end_x < _FAR_END else 1.0
        axes.plot([end_x, x + 0.004], [end_y, y], color=color, zorder=1, **joint)
        name = axes.annotate(shorten(text, _NAME_LENGTH), xy=(x, y), color=color, **look)
        if x < 1:
            name.set_bbox(inside)


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
