"""The figures of the report. A figure is a list of panels; an empty one is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import offset_copy

from trainer.report import drawing
from trainer.report.drawing import INK, MUTED, PAPER, Panel, Styles
from trainer.report.error_types import ERROR_TYPES, LABELS, RIGHT
from trainer.report.format import count, shorten
from trainer.report.load import Study
from trainer.report.methods import label, method_rank
from trainer.report.report_data import ReportData
from trainer.report.statistics import Floats
from trainer.report.summary import CELL

_NUM_RAW_BINS = 250  # a long loss curve is thinned to so many bins, each with its smallest and largest loss
_LOG_RATIO = 8  # losses and speeds that span more than this are shown on a log axis
_WIDTH = 6.4  # inches, of figures with a row for each student
_ROW = 0.21
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g} %")
_COUNT = FuncFormatter(lambda value, _: count(value))


def all_figures(data: ReportData, styles: Styles) -> dict[str, list[Panel]]:
    """Return the panels of every figure by its file name, in the order of the page."""
    return {
        "accuracy_vs_parameters": plot_accuracy(data.summary, styles),
        "scaling_fit": plot_fits(data.fits, styles),
        "accuracy_by_num_steps": plot_num_steps(data.by_num_steps, styles),
        "what_went_wrong": plot_error_types(data.error_types, styles),
        "calculator": plot_calculator(data.calculators, styles),
        "loss_curves": plot_loss(data.study, styles),
        "throughput": plot_throughput(data.study.runs, styles),
    }


def plot_accuracy(summary: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return a panel per set of problems: a line through the means of each method, intervals, and every seed."""
    panels = []
    for title, cells in summary.groupby("panel", sort=False):
        methods = sorted(cells["method"].unique(), key=method_rank)
        text = f"Strict accuracy against parameters on {title}, for {', '.join(map(label, methods))}"
        panels.append(Panel(text, partial(_draw_accuracy, cells, methods, summary["high"].max(), styles)))
    return panels


def _draw_accuracy(
    cells: pd.DataFrame, methods: list[str], highest: float, styles: Styles, axes: Axes
) -> None:
    sizes = sorted(int(size) for size in cells["parameters"].unique())
    low, high = (math.log(max(size, 1)) for size in (sizes[0], sizes[-1]))
    margin = 0.1 * (high - low) if len(sizes) > 1 else 0.7
    low, high = low - margin, high + margin
    axes.set_xscale("log")
    axes.set_xlim(math.exp(low), math.exp(high))
    drawing.percent_axis(axes, highest)
    ends = []
    for index, method in enumerate(methods):
        found = cells[cells["method"] == method]
        # Methods stand side by side, or their bars would hide each other.
        shift = (index - (len(methods) - 1) / 2) * (high - low) * (0.015 if len(sizes) > 1 else 0.1)
        x = [int(size) * math.exp(shift) for size in found["parameters"]]
        drawing.draw_points(axes, x, found, styles[method])
        ends.append((found["mean"].iat[-1], label(method), styles[method].color))
    drawing.parameters_axis(axes, sizes, (high - low) * 0.11)
    drawing.headings(axes, cells["panel"].iat[0], "strict accuracy")
    drawing.label_lines(axes, ends)


def plot_num_steps(by_num_steps: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return a panel per set of problems and model, smallest model first."""
    panels = []
    rows = by_num_steps.assign(panel_rank=by_num_steps.groupby("panel", sort=False).ngroup())
    for _, cells in rows.groupby(["panel_rank", "parameters", "model"]):
        title = f"{cells['panel'].iat[0]}, {cells['model'].iat[0]}"
        text = f"Strict accuracy by the number of steps of the gold solution: {title}"
        panels.append(Panel(text, partial(_draw_num_steps, title, cells, rows["high"].max(), styles)))
    return panels


def _draw_num_steps(title: str, cells: pd.DataFrame, highest: float, styles: Styles, axes: Axes) -> None:
    num_problems = cells.groupby("num_steps")["n"].max()
    nums = [int(num) for num in num_problems.index]
    drawing.percent_axis(axes, highest)
    axes.set_xlim(nums[0] - 0.5, nums[-1] + 0.5)
    ends = []
    by_method = cells.groupby("method", sort=False)
    for index, (method, found) in enumerate(by_method):
        x = [num + (index - (len(by_method) - 1) / 2) * 0.08 for num in found["num_steps"]]
        drawing.draw_points(axes, x, found, styles[str(method)])
        ends.append((found["mean"].iat[-1], label(str(method)), styles[str(method)].color))
    shown = drawing.order_apart(nums, (nums[-1] - nums[0] + 1) * 0.09)
    axes.xaxis.set_major_locator(FixedLocator([nums[index] for index in shown]))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda num, _: f"{num:g}\n{num_problems.get(round(num), 0)}")
    )
    axes.set_xlabel("steps; below, problems", loc="right")
    drawing.headings(axes, title, "strict accuracy")
    drawing.label_lines(axes, ends)


def plot_loss(study: Study, styles: Styles) -> list[Panel]:
    """Return a panel per training set and model, a curve per run."""
    runs = study.runs.drop_duplicates("run_path")
    finite = {path: lines[np.isfinite(lines["loss"])] for path, lines in study.metrics.items()}
    has_loss = [bool((~finite[path]["is_validation"]).any()) for path in runs["run_path"]]
    runs = runs[has_loss].assign(parameters=runs["parameters"].fillna(0))
    panels = []
    for (data, _, model), members in runs.groupby(["train_data", "parameters", "model"]):
        # One scale for all sizes trained on the same data, so that their curves can be compared.
        losses = pd.concat([finite[path]["loss"] for path in runs["run_path"][runs["train_data"] == data]])
        title = f"{data}, {model}" if data else str(model)
        curves = [(run.run_method, run.run, finite[run.run_path]) for run in members.itertuples()]
        draw = partial(_draw_loss, title, curves, (losses.min(), losses.max()), styles)
        panels.append(Panel(f"Training loss by step: {title}", draw))
    return panels


def _draw_loss(
    title: str,
    curves: list[tuple[str, str, pd.DataFrame]],
    limits: tuple[float, float],
    styles: Styles,
    axes: Axes,
) -> None:
    low, high = limits
    ratio = high / low if low > 0 else 1.0
    if ratio > _LOG_RATIO:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.15, high * 1.15)
        drawing.log_axis(axes.yaxis, ratio)
    else:
        axes.set_ylim(min(0.0, low), high * 1.05 or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    ends: dict[str, list[float]] = {}
    for method, _, lines in sorted(curves, key=lambda curve: (method_rank(curve[0]), curve[1])):
        training, validation = lines[~lines["is_validation"]], lines[lines["is_validation"]]
        steps: Floats = training["step"].to_numpy(np.float64)
        loss: Floats = training["loss"].to_numpy()
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
    rows = rows.assign(parameters=rows["parameters"].fillna(0))
    models = [(str(model), found) for (_, model), found in rows.groupby(["parameters", "model"])]
    height = 0.85 + 0.2 * (1.4 * len(models) + sum(found["run_method"].nunique() for _, found in models))
    text = "Training throughput in tokens per second, for each model and method"
    return [Panel(text, partial(_draw_throughput, models, styles), (6.0, height))]


def _draw_throughput(models: list[tuple[str, pd.DataFrame]], styles: Styles, axes: Axes) -> None:
    ticks, place = [], 0.0
    for model, members in models:
        _name_row(axes, model, place)
        place += 1
        for method in sorted(members["run_method"].unique(), key=method_rank):
            found = members[members["run_method"] == method]
            nudges = drawing.dodge_labels([place] * len(found), min(0.18, 0.6 / len(found)))
            quartiles = found["tokens_per_second_q1"], found["tokens_per_second_q3"]
            axes.hlines(nudges, *quartiles, color=styles[method].color, linewidth=1.2, alpha=0.5)
            drawing.draw_dots(axes, found["tokens_per_second"], nudges, styles[method], s=20)
            ticks.append((place, method))
            place += 1
        place += 0.4
    axes.set_ylim(place - 0.9, -0.6)
    lowest = min(found["tokens_per_second_q1"].min() for _, found in models)
    highest = max(found["tokens_per_second_q3"].max() for _, found in models)
    if lowest > 0 and highest / lowest > _LOG_RATIO:
        axes.set_xscale("log")
        axes.set_xlim(lowest / 1.5, highest * 1.5)
        drawing.log_axis(axes.xaxis, highest / lowest)
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, 1.08 * highest or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    _name_methods(axes, ticks, styles)
    axes.xaxis.set_major_formatter(_COUNT)
    axes.grid(True, axis="both")
    axes.set_xlabel("tokens per second", loc="right", color=MUTED)
    quantity = "median step of each run; bars span the middle half of its steps"
    drawing.headings(axes, "Training throughput", quantity)


def plot_error_types(error_types: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return a panel per set of problems: a stacked bar per model and method, the mean over seeds."""
    panels = []
    counts = error_types.groupby(CELL, sort=False)[[RIGHT, *ERROR_TYPES]].sum()
    shares = counts.div(counts.sum(axis=1), axis=0).reset_index()
    for title, bars in shares.groupby("panel", sort=False):
        height = 1.5 + _ROW * (len(bars) + 1.4 * bars["model"].nunique())
        in_words = []
        for bar in bars.to_dict("records"):
            parts = [f"{LABELS[name]} {100 * bar[name]:.0f} %" for name in (RIGHT, *ERROR_TYPES) if bar[name]]
            in_words.append(f"{bar['model']}, {label(bar['method'])}: {', '.join(parts)}")
        text = f"What went wrong on {title}: " + "; ".join(in_words)
        panels.append(Panel(text, partial(_draw_error_types, bars, styles), (_WIDTH, height)))
    return panels


def _draw_error_types(bars: pd.DataFrame, styles: Styles, axes: Axes) -> None:
    places = _rows(axes, bars, 1.0, styles)
    left = bars[list(ERROR_TYPES)].cumsum(axis=1).shift(axis=1, fill_value=0).assign(right=1 - bars[RIGHT])
    for name in (*ERROR_TYPES, RIGHT):
        look: dict[str, Any] = {"color": drawing.error_type_styles()[name].color, "edgecolor": PAPER}
        axes.barh(places, bars[name], left=left[name], height=0.72, linewidth=0.6, label=LABELS[name], **look)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(_PERCENT)
    below = offset_copy(axes.transAxes, fig=axes.get_figure(root=True), y=-16, units="points")
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, ncols=3, frameon=False, fontsize=7.5,
        handlelength=1.0, handleheight=0.9, borderaxespad=0, columnspacing=1.4, labelcolor=MUTED,
    )  # fmt: skip
    quantity = "share of all problems: wrong by cause, then right"
    drawing.headings(axes, bars["panel"].iat[0], quantity)


def plot_calculator(comparisons: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return a panel per set of problems: two bars per student, with the calculator and without."""
    panels = []
    for title, pairs in comparisons.groupby("panel", sort=False):
        height = 1.0 + _ROW * (1.8 * len(pairs) + 1.4 * pairs["model"].nunique())
        text = f"Accuracy with and without the calculator on {title}"
        panels.append(Panel(text, partial(_draw_calculator, pairs, styles), (_WIDTH, height)))
    return panels


def _draw_calculator(pairs: pd.DataFrame, styles: Styles, axes: Axes) -> None:
    highest = 0.0
    for place, pair in zip(_rows(axes, pairs, 1.8, styles), pairs.itertuples(), strict=True):
        color = styles[pair.method].color
        for y, score, fill in ((place - 0.36, pair.on, color), (place + 0.36, pair.off, "none")):
            axes.barh([y], [score["accuracy"]], height=0.62, color=fill, edgecolor=color, linewidth=0.9)
            axes.hlines([y], [score["low"]], [score["high"]], color=INK, linewidth=0.8)
            highest = max(highest, score["high"])
    axes.set_xlim(0, min(1.0, 1.06 * highest))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(_PERCENT)
    quantity = "strict accuracy; filled: with the calculator, outlined: without"
    drawing.headings(axes, pairs["panel"].iat[0], quantity)


def _rows(axes: Axes, students: pd.DataFrame, step: float, styles: Styles) -> list[float]:
    """Draw a line with the name of each model, below it a row for each of its methods; return the rows' places."""
    ticks: list[tuple[float, str]] = []
    place, before = 0.0, None
    for model, method in zip(students["model"], students["method"], strict=True):
        if model != before:
            place += 0.4 if ticks else 0.0
            _name_row(axes, model, place, annotation_clip=False)
            place, before = place + (1 + step) / 2, model
        ticks.append((place, method))
        place += step
    axes.set_ylim(place - step / 2, -0.6)
    _name_methods(axes, ticks, styles)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    return [place for place, _ in ticks]


def _name_row(axes: Axes, model: str, place: float, **more: Any) -> None:
    text: dict[str, Any] = {"color": INK, "fontweight": "bold", "ha": "right", "va": "center"}
    text |= {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"} | more
    axes.annotate(shorten(model, 30), xy=(0, place), xytext=(-4, 0), **text)


def _name_methods(axes: Axes, ticks: Sequence[tuple[float, str]], styles: Styles) -> None:
    axes.yaxis.set_major_locator(FixedLocator([place for place, _ in ticks]))
    axes.set_yticklabels([shorten(label(method), 30) for _, method in ticks])
    for tick, (_, method) in zip(axes.get_yticklabels(), ticks, strict=True):
        tick.set_color(styles[method].color)


def plot_fits(fits: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Return a panel per set of problems: the fitted curves with their bands, and the means they were fitted to."""
    panels = []
    for title, drawn in fits[fits["refusal"] == ""].groupby("panel", sort=False):
        text = f"Fitted accuracy against parameters on {title}, for {', '.join(map(label, drawn['method']))}"
        panels.append(Panel(text, partial(_draw_fits, drawn, styles)))
    return panels


def _draw_fits(fits: pd.DataFrame, styles: Styles, axes: Axes) -> None:
    curves = {fit.method: np.array(fit.curve).T for fit in fits.itertuples()}
    axes.set_xscale("log")
    drawing.percent_axis(axes, max(high.max() for *_, high in curves.values()))
    ends = []
    for fit in fits.itertuples():
        style = styles[fit.method]
        x, mean, low, high = curves[fit.method]
        axes.fill_between(x, low, high, color=style.color, alpha=0.14, linewidth=0)
        axes.plot(x, mean, color=style.color, linewidth=1.4)
        drawing.draw_dots(axes, fit.sizes, fit.accuracies, style, s=20, zorder=3, clip_on=False)
        ends.append((mean[-1], label(fit.method), style.color))
    sizes = sorted(set().union(*fits["sizes"]))
    axes.set_xlim(min(c[0][0] for c in curves.values()), max(c[0][-1] for c in curves.values()))
    gap = (math.log(sizes[-1]) - math.log(sizes[0])) * 0.11
    drawing.parameters_axis(axes, sizes, gap, color=MUTED)
    drawing.headings(axes, fits["panel"].iat[0], "strict accuracy, fitted")
    drawing.label_lines(axes, ends)
