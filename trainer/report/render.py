"""Figures to bytes: one SVG and PNG file a figure, and one inline SVG a panel for the page. The same every time."""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine

from trainer.report.plots import Figure, PanelPlot
from trainer.report.style import NEUTRALS, PAPER, RC, MethodStyle

_MAX_COLUMNS = 3
_MAX_WIDTH = 12.0  # inches of a whole figure
_DPI = 200
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def figure_files(figure: Figure) -> dict[str, bytes]:
    """{file name: content}: all panels in one grid, as SVG and PNG."""
    fitting = int(_MAX_WIDTH / max(panel.size[0] for panel in figure.panels))
    columns = max(1, min(_MAX_COLUMNS, len(figure.panels), fitting))
    with _matplotlib(PAPER):
        canvas = _draw(figure.panels, columns)
        svg, png = io.BytesIO(), io.BytesIO()
        # No date and no version: two builds of the same study are the same bytes.
        FigureCanvasSVG(canvas).print_svg(svg, metadata={"Date": None, "Creator": None})
        canvas.set_dpi(_DPI)
        FigureCanvasAgg(canvas).print_png(png, metadata={"Software": None})
    return dict(zip(figure.files, (svg.getvalue(), png.getvalue()), strict=True))


def inline_panels(figure: Figure, styles: dict[str, MethodStyle]) -> list[str]:
    """Each panel as an SVG element for the page: its colours are CSS variables, its ids are its own."""
    panels = []
    with _matplotlib("none"):
        for index, panel in enumerate(figure.panels):
            svg = io.StringIO()
            FigureCanvasSVG(_draw([panel], 1)).print_svg(svg, metadata={"Date": None, "Creator": None})
            panels.append(_for_page(svg.getvalue(), f"{figure.name}-{index}", panel.description, styles))
    return panels


def _draw(panels: Sequence[PanelPlot], columns: int) -> Canvas:
    rows = math.ceil(len(panels) / columns)
    width = max(panel.size[0] for panel in panels)
    heights = [max(p.size[1] for p in panels[row * columns : (row + 1) * columns]) for row in range(rows)]
    canvas = Canvas(
        figsize=(width * columns, sum(heights)), layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06)
    )
    grid = canvas.add_gridspec(rows, columns, height_ratios=heights)
    for index, panel in enumerate(panels):
        panel.draw(canvas.add_subplot(grid[divmod(index, columns)]))
    return canvas


@contextlib.contextmanager
def _matplotlib(background: str) -> Iterator[None]:
    """Our settings, and no warning about names in scripts that the font lacks: the page's own fonts have them."""
    settings = {**RC, "figure.facecolor": background, "savefig.facecolor": background}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _for_page(svg: str, prefix: str, description: str, styles: dict[str, MethodStyle]) -> str:
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
