"""Figures of the report. A figure is a list of panels. The report omits a figure if its list is empty."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from trainer.report import drawing
from trainer.report.drawing import INK, PAPER, Panel, Style, Styles
from trainer.report.error_types import ERROR_TYPES, LABELS, RIGHT
from trainer.report.format import count, shorten
from trainer.report.load import StudyFrames
from trainer.report.methods import label, method_order
from trainer.report.report_data import ReportData
from trainer.report.summary import CELL_KEYS

_NUM_BINS = 250  # bins of a long loss curve; the smallest and largest loss of each bin are drawn
_LARGE = (7.6, 4.7)  # inches, size of a panel of accuracy against parameters
_WIDTH, _NARROW = (
    6.4,
    3.6,
)  # inches, width of a panel with bars (error types, calculator), and of one on narrow screens
_LABELS = 95  # points, width of the names to the left of such a panel
_ROW = 0.21  # inches, height of a row of such a panel
_CALCULATOR_ROW = 1.8  # height of the two bars of a method, as a multiple of _ROW
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g} %")
_COUNT = FuncFormatter(lambda value, _: count(value))


def all_figures(data: ReportData, styles: Styles) -> dict[str, list[Panel]]:
    """Return {file name: panels} for all figures, in the order in which the page shows them."""
    return {
        "accuracy_vs_parameters": plot_accuracy(data.summary, data.fits, styles),
        "accuracy_by_num_steps": plot_num_steps(data.summary, data.by_num_steps, styles),
        "what_went_wrong": plot_error_types(data.error_types, styles),
        "calculator": plot_calculator(data.calculators, styles),
        "loss_curves": plot_loss(data.study, styles),
    }


def _panels(
    rows: pd.DataFrame,
    description: str,
    draw: Callable[..., None],
    styles: Styles,
    height: tuple[float, float],
) -> list[Panel]:
    """Return one panel of bars per set of problems. `draw` is called with the panel's title, rows, styles and axes.

    `description` may contain {title} and {bars}, which is replaced by the texts in the column `in_words`. `height`: the height
    of the panel without the rows in inches, and the height of a row (of a model and method) as a multiple of _ROW.
    """
    panels = []
    for title, cells in rows.groupby("panel", sort=False):
        text = description.format(title=title, bars="; ".join(cells.get("in_words", [])))
        inches = height[0] + _ROW * (height[1] * len(cells) + 1.4 * cells["model"].nunique())
        draw_panel = partial(draw, title, cells, styles)
        panels.append(Panel(text, draw_panel, (_WIDTH, inches), (_NARROW, inches)))
    return panels


def _methods(cells: pd.DataFrame) -> list[str]:
    return sorted(cells["method"].unique(), key=method_order)


def plot_accuracy(summary: pd.DataFrame, fits: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return one panel per set of problems: means with 95 % intervals, a ring per seed, and a line or a curve per method.

    The curve is the fitted one (scaling.fit_curves) with its 95 % band. Without a fit, straight lines join the means.
    """
    panels = []
    for title, cells in summary.groupby("panel", sort=False):
        is_fitted = (fits["panel"] == title) & (fits["refusal"] == "")
        curves = {fit.method: np.array(fit.curve).T for fit in fits[is_fitted].itertuples()}
        draw = partial(_draw_accuracy, str(title), cells, curves, styles)
        text = f"Strict accuracy against parameters on {title}, for {', '.join(map(label, _methods(cells)))}"
        panels.append(Panel(text, draw, _LARGE, (_NARROW, 3.4)))
    return panels


def _draw_accuracy(
    title: str, cells: pd.DataFrame, curves: dict[str, Any], styles: Styles, axes: Axes
) -> None:
    sizes = sorted(int(size) for size in cells["parameters"].unique())
    methods = _methods(cells)
    logs = [math.log(max(size, 1)) for size in sizes]
    spread = logs[-1] - logs[0] if len(sizes) > 1 else 2.0
    closest = min((b - a for a, b in pairwise(logs)), default=spread)
    gap = min(0.018 * spread, 0.6 * closest / len(methods))  # between the points of neighbouring methods
    margin = max(0.06 * spread, 0.7 * gap * len(methods))
    axes.set_xscale("log")
    axes.set_xlim(math.exp(logs[0] - margin), math.exp(logs[-1] + margin))
    drawing.percent_axis(axes, cells["high"].max())
    drawing.parameters_axis(axes, sizes, 0.12 * spread)
    half = gap * len(methods) / 2
    drawing.mark_groups(axes, [(size * math.exp(-half), size * math.exp(half)) for size in sizes])
    for method, (x, mean, low, high) in curves.items():
        axes.fill_between(x, low, high, color=styles[method].color, alpha=0.13, linewidth=0, zorder=1)
        axes.plot(x, mean, color=styles[method].color, linewidth=1.5, zorder=2)
    ends = _draw_methods(
        axes, cells.assign(x=cells["parameters"].astype(int)), methods, lambda x, n: x * math.exp(gap * n),
        styles, frozenset(curves),
    )  # fmt: skip
    for index, (method, (_, _, *name)) in enumerate(zip(methods, ends, strict=True)):
        if method in curves:
            x, mean, *_ = curves[method]
            ends[index] = (x[-1], mean[-1], *name)
    drawing.headings(axes, title, "strict accuracy")
    drawing.label_lines(axes, ends)


def plot_num_steps(summary: pd.DataFrame, by_num_steps: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return one panel per set of problems and model: accuracy by number of gold steps. Smaller models come first in a set.

    All panels have the same axes.
    """
    panels = []
    legend = tuple((label(method), styles[method]) for method in _methods(by_num_steps))
    for (panel, size, model), cells in by_num_steps.groupby(["panel", "parameters", "model"], sort=False):
        of_panel = by_num_steps[by_num_steps["panel"] == panel]
        is_model = (summary[["panel", "parameters", "model"]] == [panel, size, model]).all(axis=1)
        methods = list(summary["method"][is_model])
        draw = partial(_draw_num_steps, str(model), cells, methods, of_panel, styles)
        text = f"Strict accuracy by the number of steps of the gold solution: {model}, {panel}"
        panels.append(Panel(text, draw, legend=legend))
    return panels


def _draw_num_steps(
    title: str, cells: pd.DataFrame, methods: list[str], of_panel: pd.DataFrame, styles: Styles, axes: Axes
) -> None:
    num_problems = of_panel.groupby("num_steps")["n"].max()
    nums = [int(num) for num in num_problems.index]
    drawing.percent_axis(axes, of_panel["high"].max())
    axes.set_xlim(nums[0] - 0.5, nums[-1] + 0.5)
    shown = drawing.select_spaced(nums, (nums[-1] - nums[0] + 1) * 0.09)
    axes.xaxis.set_major_locator(FixedLocator([nums[index] for index in shown]))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda num, _: f"{num:g}\n{num_problems.get(round(num), 0)}")
    )
    axes.set_xlabel("steps; below, problems", loc="right")
    gap = min(0.14, 0.7 / len(methods))
    half = gap * len(methods) / 2
    drawing.mark_groups(axes, [(num - half, num + half) for num in nums])
    _draw_methods(axes, cells.assign(x=cells["num_steps"]), methods, lambda x, n: x + gap * n, styles)
    drawing.headings(axes, title, f"strict accuracy, {cells['panel'].iat[0]}")


def _draw_methods(
    axes: Axes,
    cells: pd.DataFrame,
    methods: list[str],
    move: Callable[[float, float], float],
    styles: Styles,
    without_line: frozenset[str] = frozenset(),
) -> list[tuple[float, float, str, str]]:
    """Draw the points of each method, and a line through its means. Return the ends of the lines for drawing.label_lines.

    `cells["x"]` is the horizontal position. `move(x, n)` returns x shifted by n small gaps. n differs between methods, so that
    their intervals do not hide each other. The limits of the axes must be final.
    """
    ends = []
    for index, method in enumerate(methods):
        of_method = cells[cells["method"] == method]
        if not of_method.empty:
            x = [move(value, index - (len(methods) - 1) / 2) for value in of_method["x"]]
            drawing.draw_points(axes, x, of_method, styles[method], method not in without_line)
            ends.append((x[-1], of_method["mean"].iat[-1], label(method), styles[method].color))
    return ends


def plot_loss(study: StudyFrames, styles: Styles) -> list[Panel]:
    """Return one panel per training set and model, with a loss curve per run. Each panel has its own scales."""
    runs = study.runs.drop_duplicates("run_path")
    finite = {path: lines[np.isfinite(lines["loss"])] for path, lines in study.metrics.items()}
    has_loss = [bool((~finite[path]["is_validation"]).any()) for path in runs["run_path"]]
    order = runs["run_method"].map(method_order)
    runs = runs[has_loss].assign(parameters=runs["parameters"].fillna(0), order=order)
    panels = []
    for (data, _, model), members in runs.groupby(["train_data", "parameters", "model"]):
        title = f"{model}, {data}" if runs["train_data"].nunique() > 1 else str(model)
        members = members.sort_values(["order", "run"], kind="stable")
        curves = [(run.run_method, finite[run.run_path]) for run in members.itertuples()]
        panels.append(
            Panel(f"Training loss by step: {model}, {data}", partial(_draw_loss, title, curves, styles))
        )
    return panels


def _draw_loss(title: str, curves: list[tuple[str, pd.DataFrame]], styles: Styles, axes: Axes) -> None:
    losses = pd.concat([lines["loss"] for _, lines in curves])
    drawing.loss_axis(axes, losses.min(), losses.max())
    ends: dict[str, list[tuple[float, float]]] = {}
    for method, lines in curves:
        training, validation = lines[~lines["is_validation"]], lines[lines["is_validation"]]
        steps, loss = training["step"].to_numpy(np.float64), training["loss"].to_numpy()
        color = styles[method].color
        curve = drawing.smooth(loss, 2 * max(2, len(loss) // 60) + 1)
        for y, width, alpha, order in ((loss, 0.6, 0.22, 1), (curve, 1.3, 0.9, 2)):
            points = drawing.bin_curve(steps, y, _NUM_BINS)
            axes.plot(*points, color=color, linewidth=width, alpha=alpha, zorder=order)
        ring: dict[str, Any] = {"color": PAPER, "edgecolors": color, "linewidths": 0.9, "zorder": 3}
        axes.scatter(validation["step"], validation["loss"], s=12, **ring)
        ends.setdefault(method, []).append((steps[-1], float(curve[-1])))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(_COUNT)
    axes.set_xlim(0, 1.02 * max(x for of_method in ends.values() for x, _ in of_method))
    axes.set_xlabel("optimizer steps", loc="right")
    scale = " (log scale)" if axes.get_yscale() == "log" else ""
    drawing.headings(axes, title, f"loss, nats per learned token{scale}")
    places = {method: np.mean(of_method, axis=0) for method, of_method in ends.items()}
    drawing.label_lines(axes, [(at[0], at[1], label(m), styles[m].color) for m, at in places.items()])


def plot_error_types(error_types: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return one panel per set of problems, with a stacked bar per model and method. A bar counts all seeds together."""
    counts = error_types.groupby(CELL_KEYS, sort=False)[[RIGHT, *ERROR_TYPES]].sum()
    shares = counts.div(counts.sum(axis=1), axis=0).reset_index()
    shares["in_words"] = [
        f"{bar['model']}, {label(bar['method'])}: "
        + ", ".join(f"{LABELS[name]} {100 * bar[name]:.0f} %" for name in (RIGHT, *ERROR_TYPES) if bar[name])
        for bar in shares.to_dict("records")
    ]
    names: dict[str, Style] = drawing.error_type_styles()
    legend = tuple((LABELS[name], names[name]) for name in (RIGHT, *ERROR_TYPES) if counts[name].any())
    panels = _panels(
        shares, "What went wrong on {title}: {bars}", _draw_error_types, styles, height=(0.9, 1.0)
    )
    return [replace(panel, legend=legend) for panel in panels]


def _draw_error_types(title: str, bars: pd.DataFrame, styles: Styles, axes: Axes) -> None:
    y = _label_rows(axes, bars, 1.0, styles)
    names = [RIGHT, *ERROR_TYPES]
    left = bars[names].cumsum(axis=1).shift(axis=1, fill_value=0)
    for name in names:
        look: dict[str, Any] = {"color": drawing.error_type_styles()[name].color, "edgecolor": PAPER}
        axes.barh(y, bars[name], left=left[name], height=0.72, linewidth=0.6, **look)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(_PERCENT)
    drawing.headings(axes, title, "share of problems: right, then wrong", _LABELS)


def plot_calculator(comparisons: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return one panel per set of problems. Each model and method has two bars: with and without the calculator."""
    text = "Accuracy with and without the calculator on {title}"
    return _panels(comparisons, text, _draw_calculator, styles, height=(1.0, _CALCULATOR_ROW))


def _draw_calculator(title: str, pairs: pd.DataFrame, styles: Styles, axes: Axes) -> None:
    highest = 0.0
    y_pairs = _label_rows(axes, pairs, _CALCULATOR_ROW, styles)
    for y_pair, pair in zip(y_pairs, pairs.itertuples(), strict=True):
        color = styles[pair.method].color
        for y, score, fill in ((y_pair - 0.36, pair.on, color), (y_pair + 0.36, pair.off, "none")):
            axes.barh([y], [score["accuracy"]], height=0.62, color=fill, edgecolor=color, linewidth=0.9)
            axes.hlines([y], [score["low"]], [score["high"]], color=INK, linewidth=0.8)
            highest = max(highest, score["high"])
    axes.set_xlim(0, min(1.0, 1.06 * highest))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(_PERCENT)
    drawing.headings(axes, title, "calculator on (filled) and off", _LABELS)


def _label_rows(axes: Axes, cells: pd.DataFrame, step: float, styles: Styles) -> list[float]:
    """Label the vertical axis with models and, below each, a row per method. `step`: row spacing. Return the y of each row."""
    is_first = (cells["model"] != cells["model"].shift()).to_numpy()
    models_above = np.cumsum(is_first) - 1
    below_model = (1 + step) / 2
    y = step * np.arange(len(cells)) + (0.4 + below_model) * models_above + below_model
    look: dict[str, Any] = {
        "color": INK,
        "fontweight": "bold",
        "ha": "right",
        "va": "center",
        "xytext": (-4, 0),
    }
    look |= {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
    for height, model in zip(y[is_first] - below_model, cells["model"][is_first], strict=True):
        axes.annotate(shorten(model, 30), xy=(0, height), **look)
    axes.set_ylim(y[-1] + step / 2, -0.6)
    axes.yaxis.set_major_locator(FixedLocator(list(y)))
    axes.set_yticklabels([shorten(label(method), 30) for method in cells["method"]])
    for tick, method in zip(axes.get_yticklabels(), cells["method"], strict=True):
        tick.set(color=styles[method].color, fontfamily=drawing.NAME_FONT)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    return list(y)
