"""Figures of the report. A figure is a list of panels. The report omits a figure if its list is empty."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from matplotlib.transforms import offset_copy

from trainer.report import drawing
from trainer.report.drawing import INK, MUTED, PAPER, Panel, Styles
from trainer.report.error_types import ERROR_TYPES, LABELS, RIGHT
from trainer.report.format import count, shorten
from trainer.report.load import StudyFrames
from trainer.report.methods import label, method_order
from trainer.report.report_data import ReportData
from trainer.report.summary import CELL_KEYS

_NUM_BINS = 250  # bins of a long loss curve; the smallest and largest loss of each bin are drawn
_WIDTH = 6.4  # inches, width of a panel with bars (error types, calculator)
_ROW = 0.21  # inches, height of a row of such a panel
_CALCULATOR_ROW = 1.8  # height of the two bars of a method, as a multiple of _ROW
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g} %")
_COUNT = FuncFormatter(lambda value, _: count(value))


def all_figures(data: ReportData, styles: Styles) -> dict[str, list[Panel]]:
    """Return {file name: panels} for all figures, in the order in which the page shows them."""
    return {
        "accuracy_vs_parameters": plot_accuracy(data.summary, styles),
        "scaling_fit": plot_fits(data.fits, styles),
        "accuracy_by_num_steps": plot_num_steps(data.summary, data.by_num_steps, styles),
        "what_went_wrong": plot_error_types(data.error_types, styles),
        "calculator": plot_calculator(data.calculators, styles),
        "loss_curves": plot_loss(data.study, styles),
        "throughput": plot_throughput(data.study.runs, styles),
    }


def _panels(
    rows: pd.DataFrame,
    description: str,
    draw: Callable[..., None],
    styles: Styles,
    height: tuple[float, float] | None = None,
) -> list[Panel]:
    """Return one panel per set of problems. To draw a panel, `draw` is called with its title, rows, styles and axes.

    `description` may contain {title}, {methods} and {bars}. {bars} is replaced by the texts in the column `in_words`.
    `height` is for panels with a row per model and method. It is a pair: the height of the panel without the rows in inches,
    and the height of a row as a multiple of _ROW.
    """
    panels = []
    for title, cells in rows.groupby("panel", sort=False):
        methods, bars = ", ".join(map(label, _methods(cells))), "; ".join(cells.get("in_words", []))
        text = description.format(title=title, methods=methods, bars=bars)
        panel = Panel(text, partial(draw, title, cells, styles))
        if height:
            inches = height[0] + _ROW * (height[1] * len(cells) + 1.4 * cells["model"].nunique())
            panel = replace(panel, size=(_WIDTH, inches))
        panels.append(panel)
    return panels


def _methods(cells: pd.DataFrame) -> list[str]:
    return sorted(cells["method"].unique(), key=method_order)


def plot_accuracy(summary: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return one panel per set of problems. Each method has 95 % intervals, a dot per seed, and a line through the means."""
    text = "Strict accuracy against parameters on {title}, for {methods}"
    return _panels(summary, text, partial(_draw_accuracy, summary["high"].max()), styles)


def _draw_accuracy(highest: float, title: str, cells: pd.DataFrame, styles: Styles, axes: Axes) -> None:
    sizes = sorted(int(size) for size in cells["parameters"].unique())
    low, high = (math.log(max(size, 1)) for size in (sizes[0], sizes[-1]))
    margin = 0.1 * (high - low) if len(sizes) > 1 else 0.7
    low, high = low - margin, high + margin
    axes.set_xscale("log")
    axes.set_xlim(math.exp(low), math.exp(high))
    drawing.percent_axis(axes, highest)
    gap = (high - low) * (0.015 if len(sizes) > 1 else 0.1)
    drawing.parameters_axis(axes, sizes, (high - low) * 0.11)
    cells = cells.assign(x=cells["parameters"].astype(int))
    _draw_methods(axes, title, cells, _methods(cells), lambda x, shift: x * math.exp(gap * shift), styles)


def plot_num_steps(summary: pd.DataFrame, by_num_steps: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return one panel per set of problems and model: accuracy by number of gold steps. Smaller models come first in a set."""
    panels = []
    for (panel, size, model), cells in by_num_steps.groupby(["panel", "parameters", "model"], sort=False):
        title = f"{panel}, {model}"
        is_model = (summary[["panel", "parameters", "model"]] == [panel, size, model]).all(axis=1)
        methods = list(summary["method"][is_model])
        draw = partial(_draw_num_steps, title, cells, methods, by_num_steps["high"].max(), styles)
        panels.append(Panel(f"Strict accuracy by the number of steps of the gold solution: {title}", draw))
    return panels


def _draw_num_steps(
    title: str, cells: pd.DataFrame, methods: list[str], highest: float, styles: Styles, axes: Axes
) -> None:
    num_problems = cells.groupby("num_steps")["n"].max()
    nums = [int(num) for num in num_problems.index]
    drawing.percent_axis(axes, highest)
    axes.set_xlim(nums[0] - 0.5, nums[-1] + 0.5)
    shown = drawing.select_spaced(nums, (nums[-1] - nums[0] + 1) * 0.09)
    axes.xaxis.set_major_locator(FixedLocator([nums[index] for index in shown]))
    formatter = FuncFormatter(lambda num, _: f"{num:g}\n{num_problems.get(round(num), 0)}")
    axes.xaxis.set_major_formatter(formatter)
    axes.set_xlabel("steps; below, problems", loc="right")
    cells = cells.assign(x=cells["num_steps"])
    _draw_methods(axes, title, cells, methods, lambda x, shift: x + 0.08 * shift, styles)


def _draw_methods(
    axes: Axes,
    title: str,
    cells: pd.DataFrame,
    methods: list[str],
    move: Callable[[float, float], float],
    styles: Styles,
) -> None:
    """Draw a line per method through the means. The column `x` of `cells` is the horizontal position.

    `move(x, n)` returns x shifted by n small gaps. n differs between methods, so that their intervals do not hide each
    other. The limits of the axes must be final.
    """
    ends = []
    for index, method in enumerate(methods):
        of_method = cells[cells["method"] == method]
        if not of_method.empty:
            x = [move(value, index - (len(methods) - 1) / 2) for value in of_method["x"]]
            drawing.draw_points(axes, x, of_method, styles[method])
            ends.append((of_method["mean"].iat[-1], label(method), styles[method].color))
    drawing.headings(axes, title, "strict accuracy")
    drawing.label_lines(axes, ends)


def plot_fits(fits: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return one panel per set of problems: fitted curves with 95 % bands, and the observed mean accuracies."""
    text = "Fitted accuracy against parameters on {title}, for {methods}"
    return _panels(fits[fits["refusal"] == ""], text, _draw_fits, styles)


def _draw_fits(title: str, fits: pd.DataFrame, styles: Styles, axes: Axes) -> None:
    curves = [np.array(curve).T for curve in fits["curve"]]
    axes.set_xscale("log")
    drawing.percent_axis(axes, max(high.max() for *_, high in curves))
    ends = []
    for fit, (x, mean, low, high) in zip(fits.itertuples(), curves, strict=True):
        style = styles[fit.method]
        axes.fill_between(x, low, high, color=style.color, alpha=0.14, linewidth=0)
        axes.plot(x, mean, color=style.color, linewidth=1.4)
        drawing.draw_dots(axes, fit.sizes, fit.accuracies, style, s=20, zorder=3, clip_on=False)
        ends.append((mean[-1], label(fit.method), style.color))
    sizes = sorted(set().union(*fits["sizes"]))
    axes.set_xlim(min(curve[0][0] for curve in curves), max(curve[0][-1] for curve in curves))
    drawing.parameters_axis(axes, sizes, math.log(sizes[-1] / sizes[0]) * 0.11, color=MUTED)
    drawing.headings(axes, title, "strict accuracy, fitted")
    drawing.label_lines(axes, ends)


def plot_loss(study: StudyFrames, styles: Styles) -> list[Panel]:
    """Return one panel per training set and model, with a loss curve per run."""
    runs = study.runs.drop_duplicates("run_path")
    finite = {path: lines[np.isfinite(lines["loss"])] for path, lines in study.metrics.items()}
    has_loss = [bool((~finite[path]["is_validation"]).any()) for path in runs["run_path"]]
    order = runs["run_method"].map(method_order)
    runs = runs[has_loss].assign(parameters=runs["parameters"].fillna(0), order=order)
    panels = []
    for (data, _, model), members in runs.groupby(["train_data", "parameters", "model"]):
        # All panels of a training set have the same vertical scale, so that curves of different models can be compared.
        losses = pd.concat([finite[path]["loss"] for path in runs["run_path"][runs["train_data"] == data]])
        title = f"{data}, {model}" if data else str(model)
        members = members.sort_values(["order", "run"], kind="stable")
        curves = [(run.run_method, finite[run.run_path]) for run in members.itertuples()]
        draw = partial(_draw_loss, title, curves, losses.min(), losses.max(), styles)
        panels.append(Panel(f"Training loss by step: {title}", draw))
    return panels


def _draw_loss(
    title: str, curves: list[tuple[str, pd.DataFrame]], low: float, high: float, styles: Styles, axes: Axes
) -> None:
    drawing.value_axis(axes, "y", low, high, (min(0.0, low), high * 1.05 or 1.0), log_margin=1.15, bins=5)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ends: dict[str, list[float]] = {}
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
        ends.setdefault(method, []).append(float(curve[-1]))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(_COUNT)
    axes.margins(x=0.02)
    axes.set_xlabel("optimizer steps", loc="right")
    drawing.headings(axes, title, "loss, nats per learned token")
    drawing.label_lines(axes, [(float(np.mean(end)), label(m), styles[m].color) for m, end in ends.items()])


def plot_throughput(runs: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return one panel with a row per model and method.

    Each run has a dot at the median tokens per second of its steps, and a bar between the quartiles.
    """
    rows = runs.drop_duplicates("run_path").dropna(subset="tokens_per_second")
    if rows.empty:
        return []
    rows = rows.assign(parameters=rows["parameters"].fillna(0), method=rows["run_method"])
    rows = rows.assign(order=rows["method"].map(method_order))
    rows = rows.sort_values(["parameters", "model", "order"], kind="stable")
    bars = [cells for _, cells in rows.groupby(["parameters", "model", "method"], sort=False)]
    num_models = rows.groupby(["parameters", "model"]).ngroups
    size = (6.0, 0.85 + 0.2 * (1.4 * num_models + len(bars)))
    text = "Training throughput in tokens per second, for each model and method"
    return [Panel(text, partial(_draw_throughput, bars, styles), size)]


def _draw_throughput(bars: list[pd.DataFrame], styles: Styles, axes: Axes) -> None:
    names = pd.concat([cells.head(1) for cells in bars])
    for y, cells in zip(_label_rows(axes, names, 1.0, styles), bars, strict=True):
        style = styles[cells["method"].iat[0]]
        nudges = drawing.dodge_labels([y] * len(cells), min(0.18, 0.6 / len(cells)))
        quartiles = cells["tokens_per_second_q1"], cells["tokens_per_second_q3"]
        axes.hlines(nudges, *quartiles, color=style.color, linewidth=1.2, alpha=0.5)
        drawing.draw_dots(axes, cells["tokens_per_second"], nudges, style, s=20)
    low = min(cells["tokens_per_second_q1"].min() for cells in bars)
    high = max(cells["tokens_per_second_q3"].max() for cells in bars)
    drawing.value_axis(axes, "x", low, high, (0, 1.08 * high or 1.0), log_margin=1.5, bins=6)
    axes.xaxis.set_major_formatter(_COUNT)
    axes.grid(True, axis="both")
    axes.set_xlabel("tokens per second", loc="right", color=MUTED)
    quantity = "dot: median over the steps of a run; bar: between the quartiles"
    drawing.headings(axes, "Training throughput", quantity)


def plot_error_types(error_types: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return one panel per set of problems, with a stacked bar per model and method. A bar counts all seeds together."""
    counts = error_types.groupby(CELL_KEYS, sort=False)[[RIGHT, *ERROR_TYPES]].sum()
    shares = counts.div(counts.sum(axis=1), axis=0).reset_index()
    shares["in_words"] = [
        f"{bar['model']}, {label(bar['method'])}: "
        + ", ".join(f"{LABELS[name]} {100 * bar[name]:.0f} %" for name in (RIGHT, *ERROR_TYPES) if bar[name])
        for bar in shares.to_dict("records")
    ]
    return _panels(shares, "What went wrong on {title}: {bars}", _draw_error_types, styles, height=(1.5, 1.0))


def _draw_error_types(title: str, bars: pd.DataFrame, styles: Styles, axes: Axes) -> None:
    y = _label_rows(axes, bars, 1.0, styles)
    left = bars[list(ERROR_TYPES)].cumsum(axis=1).shift(axis=1, fill_value=0).assign(right=1 - bars[RIGHT])
    for name in (*ERROR_TYPES, RIGHT):
        look: dict[str, Any] = {"color": drawing.error_type_styles()[name].color, "edgecolor": PAPER}
        axes.barh(y, bars[name], left=left[name], height=0.72, linewidth=0.6, label=LABELS[name], **look)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(_PERCENT)
    below = offset_copy(axes.transAxes, fig=axes.get_figure(root=True), y=-16, units="points")
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, ncols=3, frameon=False, fontsize=7.5,
        handlelength=1.0, handleheight=0.9, borderaxespad=0, columnspacing=1.4, labelcolor=MUTED,
    )  # fmt: skip
    drawing.headings(axes, title, "share of all problems: wrong by cause, then right")


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
    drawing.headings(axes, title, "strict accuracy; filled: with the calculator, outlined: without")


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
        tick.set_color(styles[method].color)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    return list(y)
