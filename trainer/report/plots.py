"""The figures of the report. A figure is a list of panels; a figure without panels is left out."""

from __future__ import annotations

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
from trainer.report.methods import label, method_rank
from trainer.report.report_data import ReportData
from trainer.report.summary import CELL

_NUM_RAW_BINS = 250  # bins to which a long loss curve is thinned, each with its smallest and largest loss
_WIDTH = 6.4  # inches, of figures with a row for each method
_ROW = 0.21  # inches
_CALCULATOR_ROW = 1.8  # rows that the two bars of a method take
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g} %")
_COUNT = FuncFormatter(lambda value, _: count(value))


def all_figures(data: ReportData, styles: Styles) -> dict[str, list[Panel]]:
    """Return the panels of every figure by its file name, in the order of the page."""
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
    describe: Callable[[str, pd.DataFrame], str],
    draw: Callable[..., None],
    styles: Styles,
    height: tuple[float, float] | None = None,
) -> list[Panel]:
    """Return a panel for each set of problems; `draw` gets its title, its rows, styles and axes.

    `height`: of a panel with a row for each method, inches without rows and the height of one (_rows).
    """
    panels = []
    for title, found in rows.groupby("panel", sort=False):
        panel = Panel(describe(str(title), found), partial(draw, str(title), found, styles))
        if height:
            inches = height[0] + _ROW * (height[1] * len(found) + 1.4 * found["model"].nunique())
            panel = replace(panel, size=(_WIDTH, inches))
        panels.append(panel)
    return panels


def plot_accuracy(summary: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return a panel per set of problems: a line through the means of each method, intervals, and every seed."""

    def describe(title: str, cells: pd.DataFrame) -> str:
        methods = sorted(cells["method"].unique(), key=method_rank)
        return f"Strict accuracy against parameters on {title}, for {', '.join(map(label, methods))}"

    return _panels(summary, describe, partial(_draw_accuracy, summary["high"].max()), styles)


def _draw_accuracy(highest: float, title: str, cells: pd.DataFrame, styles: Styles, axes: Axes) -> None:
    sizes = sorted(int(size) for size in cells["parameters"].unique())
    low, high = (math.log(max(size, 1)) for size in (sizes[0], sizes[-1]))
    margin = 0.1 * (high - low) if len(sizes) > 1 else 0.7
    low, high = low - margin, high + margin
    axes.set_xscale("log")
    axes.set_xlim(math.exp(low), math.exp(high))
    drawing.percent_axis(axes, highest)
    methods = sorted(cells["method"].unique(), key=method_rank)
    gap = (high - low) * (0.015 if len(sizes) > 1 else 0.1)
    drawing.parameters_axis(axes, sizes, (high - low) * 0.11)
    cells = cells.assign(x=cells["parameters"].astype(int))
    _draw_methods(axes, title, cells, methods, lambda x, shift: x * math.exp(gap * shift), styles)


def plot_num_steps(summary: pd.DataFrame, by_num_steps: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return a panel per set of problems and model, smallest model first."""
    highest = by_num_steps["high"].max()
    panels = []
    for (panel, _, model), cells in summary.groupby(["panel", "parameters", "model"], sort=False):
        found = by_num_steps[(by_num_steps["panel"] == panel) & (by_num_steps["model"] == model)]
        found = found[found["parameters"] == cells["parameters"].iat[0]]
        if not found.empty:
            title = f"{panel}, {model}"
            text = f"Strict accuracy by the number of steps of the gold solution: {title}"
            draw = partial(_draw_num_steps, title, found, list(cells["method"]), highest, styles)
            panels.append(Panel(text, draw))
    return panels


def _draw_num_steps(
    title: str, cells: pd.DataFrame, methods: list[str], highest: float, styles: Styles, axes: Axes
) -> None:
    num_problems = cells.groupby("num_steps")["n"].max()
    nums = [int(num) for num in num_problems.index]
    drawing.percent_axis(axes, highest)
    axes.set_xlim(nums[0] - 0.5, nums[-1] + 0.5)
    shown = drawing.order_apart(nums, (nums[-1] - nums[0] + 1) * 0.09)
    axes.xaxis.set_major_locator(FixedLocator([nums[index] for index in shown]))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda num, _: f"{num:g}\n{num_problems.get(round(num), 0)}")
    )
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
    """Draw a line per method through the means at `x`, moved sideways so that intervals do not hide each other.

    Methods without cells keep their position. The axes' limits must be final.
    """
    ends = []
    for index, method in enumerate(methods):
        found = cells[cells["method"] == method]
        if not found.empty:
            x = [move(value, index - (len(methods) - 1) / 2) for value in found["x"]]
            drawing.draw_points(axes, x, found, styles[method])
            ends.append((found["mean"].iat[-1], label(method), styles[method].color))
    drawing.headings(axes, title, "strict accuracy")
    drawing.label_lines(axes, ends)


def plot_fits(fits: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return a panel per set of problems: the fitted curves with their bands, and the means they were fitted to."""

    def describe(title: str, drawn: pd.DataFrame) -> str:
        return f"Fitted accuracy against parameters on {title}, for {', '.join(map(label, drawn['method']))}"

    return _panels(fits[fits["refusal"] == ""], describe, _draw_fits, styles)


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
    gap = (math.log(sizes[-1]) - math.log(sizes[0])) * 0.11
    drawing.parameters_axis(axes, sizes, gap, color=MUTED)
    drawing.headings(axes, title, "strict accuracy, fitted")
    drawing.label_lines(axes, ends)


def plot_loss(study: StudyFrames, styles: Styles) -> list[Panel]:
    """Return a panel per training set and model, a curve per run."""
    runs = study.runs.drop_duplicates("run_path")
    finite = {path: lines[np.isfinite(lines["loss"])] for path, lines in study.metrics.items()}
    has_loss = [bool((~finite[path]["is_validation"]).any()) for path in runs["run_path"]]
    runs = runs[has_loss].assign(
        parameters=runs["parameters"].fillna(0), rank=runs["run_method"].map(method_rank)
    )
    panels = []
    for (data, _, model), members in runs.groupby(["train_data", "parameters", "model"]):
        # One scale for all sizes trained on the same data, so that their curves can be compared.
        losses = pd.concat([finite[path]["loss"] for path in runs["run_path"][runs["train_data"] == data]])
        title = f"{data}, {model}" if data else str(model)
        members = members.sort_values(["rank", "run"], kind="stable")
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
            points = drawing.bin_curve(steps, y, _NUM_RAW_BINS)
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
    """Return one panel: a row per model and method, a dot at each run's median and a bar over its middle half."""
    rows = runs.drop_duplicates("run_path").dropna(subset="tokens_per_second")
    if rows.empty:
        return []
    rows = rows.assign(parameters=rows["parameters"].fillna(0), rank=rows["run_method"].map(method_rank))
    rows = rows.sort_values(["parameters", "model", "rank"], kind="stable")
    rows = rows.drop(columns="method").rename(columns={"run_method": "method"})
    bars = [(key, found) for key, found in rows.groupby(["parameters", "model", "method"], sort=False)]
    names = pd.DataFrame([key for key, _ in bars], columns=["parameters", "model", "method"])
    height = 0.85 + 0.2 * (1.4 * len(names.groupby(["parameters", "model"])) + len(names))
    text = "Training throughput in tokens per second, for each model and method"
    draw = partial(_draw_throughput, names, [found for _, found in bars], styles)
    return [Panel(text, draw, (6.0, height))]


def _draw_throughput(names: pd.DataFrame, bars: list[pd.DataFrame], styles: Styles, axes: Axes) -> None:
    for y, found in zip(_rows(axes, names, 1.0, styles), bars, strict=True):
        style = styles[found["method"].iat[0]]
        nudges = drawing.dodge_labels([y] * len(found), min(0.18, 0.6 / len(found)))
        quartiles = found["tokens_per_second_q1"], found["tokens_per_second_q3"]
        axes.hlines(nudges, *quartiles, color=style.color, linewidth=1.2, alpha=0.5)
        drawing.draw_dots(axes, found["tokens_per_second"], nudges, style, s=20)
    low = min(found["tokens_per_second_q1"].min() for found in bars)
    high = max(found["tokens_per_second_q3"].max() for found in bars)
    drawing.value_axis(axes, "x", low, high, (0, 1.08 * high or 1.0), log_margin=1.5, bins=6)
    axes.xaxis.set_major_formatter(_COUNT)
    axes.grid(True, axis="both")
    axes.set_xlabel("tokens per second", loc="right", color=MUTED)
    quantity = "median step of each run; bars span the middle half of its steps"
    drawing.headings(axes, "Training throughput", quantity)


def plot_error_types(error_types: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return a panel per set of problems: a stacked bar per model and method, the mean over seeds."""
    counts = error_types.groupby(CELL, sort=False)[[RIGHT, *ERROR_TYPES]].sum()
    shares = counts.div(counts.sum(axis=1), axis=0).reset_index()

    def describe(title: str, bars: pd.DataFrame) -> str:
        in_words = []
        for bar in bars.to_dict("records"):
            shown = [f"{LABELS[name]} {100 * bar[name]:.0f} %" for name in (RIGHT, *ERROR_TYPES) if bar[name]]
            in_words.append(f"{bar['model']}, {label(bar['method'])}: {', '.join(shown)}")
        return f"What went wrong on {title}: {'; '.join(in_words)}"

    return _panels(shares, describe, _draw_error_types, styles, height=(1.5, 1.0))


def _draw_error_types(title: str, bars: pd.DataFrame, styles: Styles, axes: Axes) -> None:
    y = _rows(axes, bars, 1.0, styles)
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
    """Return a panel per set of problems: two bars per model and method, with the calculator and without."""

    def describe(title: str, _: pd.DataFrame) -> str:
        return f"Accuracy with and without the calculator on {title}"

    return _panels(comparisons, describe, _draw_calculator, styles, height=(1.0, _CALCULATOR_ROW))


def _draw_calculator(title: str, pairs: pd.DataFrame, styles: Styles, axes: Axes) -> None:
    highest = 0.0
    for y_pair, pair in zip(_rows(axes, pairs, _CALCULATOR_ROW, styles), pairs.itertuples(), strict=True):
        color = styles[pair.method].color
        for y, score, fill in ((y_pair - 0.36, pair.on, color), (y_pair + 0.36, pair.off, "none")):
            axes.barh([y], [score["accuracy"]], height=0.62, color=fill, edgecolor=color, linewidth=0.9)
            axes.hlines([y], [score["low"]], [score["high"]], color=INK, linewidth=0.8)
            highest = max(highest, score["high"])
    axes.set_xlim(0, min(1.0, 1.06 * highest))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(_PERCENT)
    drawing.headings(axes, title, "strict accuracy; filled: with the calculator, outlined: without")


def _rows(axes: Axes, cells: pd.DataFrame, step: float, styles: Styles) -> list[float]:
    """Label the vertical axis with each model and, below it, a row per method; return the y of the rows.

    step: height of a row.
    """
    name: dict[str, Any] = {
        "color": INK,
        "fontweight": "bold",
        "ha": "right",
        "va": "center",
        "xytext": (-4, 0),
    }
    name |= {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
    rows: list[float] = []
    y, before = 0.0, None
    for model in cells["model"]:
        if model != before:
            y += 0.4 if rows else 0.0
            axes.annotate(shorten(model, 30), xy=(0, y), **name)
            y, before = y + (1 + step) / 2, model
        rows.append(y)
        y += step
    axes.set_ylim(y - step / 2, -0.6)
    axes.yaxis.set_major_locator(FixedLocator(rows))
    axes.set_yticklabels([shorten(label(method), 30) for method in cells["method"]])
    for tick, method in zip(axes.get_yticklabels(), cells["method"], strict=True):
        tick.set_color(styles[method].color)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    return rows
