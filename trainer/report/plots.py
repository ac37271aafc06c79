"""What each figure shows. A figure is a list of panels; a panel draws itself into axes that render.py makes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from trainer.report.drawing import (
    apart,
    draw_points,
    headings,
    label_lines,
    percent_axis,
    smooth,
    spread,
    thin,
)
from trainer.report.format import count, shorten
from trainer.report.methods import label, method_rank
from trainer.report.results import Run
from trainer.report.style import INK, MUTED, PAPER, MethodStyle
from trainer.report.summary import Cell, Estimate, Panel, estimate

Styles = dict[str, MethodStyle]
Rows = dict[tuple[int, str], dict[str, list[Run]]]  # (num_parameters, model) -> method -> runs
_PANEL_SIZE = (3.7, 2.75)  # inches
_NUM_RAW_BINS = 250  # a long loss curve is thinned to so many bins, each with its smallest and largest loss
_LOG_RATIO = 8  # losses and speeds that span more than this are shown on a log axis


@dataclass(frozen=True)
class PanelPlot:
    description: str  # for screen readers
    draw: Callable[[Axes], None]
    size: tuple[float, float] = _PANEL_SIZE  # inches


@dataclass(frozen=True)
class Figure:
    name: str
    panels: list[PanelPlot]

    @property
    def files(self) -> tuple[str, str]:
        return f"{self.name}.svg", f"{self.name}.png"


def accuracy_vs_parameters(panels: Sequence[Panel], styles: Styles) -> Figure:
    """A panel for each set of problems: a line through the means of each method, intervals, and every seed."""
    plots = []
    highest = max((cell.estimate.high for panel in panels for cell in panel.cells), default=1.0)
    for panel in panels:
        text = (
            f"Strict accuracy against parameters on {panel.title}, for {', '.join(map(label, panel.methods))}"
        )
        plots.append(PanelPlot(text, partial(_draw_accuracy, panel, highest, styles)))
    return Figure("accuracy_vs_parameters", plots)


def accuracy_by_num_steps(panels: Sequence[Panel], styles: Styles) -> Figure:
    """A panel for each set of problems and each model, smallest model first."""
    plots = []
    by_steps = [
        e.high for panel in panels for cell in panel.cells for e in _estimates_by_steps(cell).values()
    ]
    highest = max(by_steps, default=1.0)
    for panel in panels:
        for model in panel.models:
            cells = panel.of_model(model)
            if any(_estimates_by_steps(cell) for cell in cells):
                title = f"{panel.title}, {model[1]}"
                text = f"Strict accuracy by the number of steps of the gold solution: {title}"
                plots.append(PanelPlot(text, partial(_draw_by_num_steps, title, cells, highest, styles)))
    return Figure("accuracy_by_num_steps", plots)


def loss_curves(runs: Sequence[Run], styles: Styles) -> Figure:
    """A panel for each training set and model, a curve for each run."""
    grouped: dict[tuple[str, int, str], list[Run]] = defaultdict(list)
    for run in runs:
        if np.isfinite(run.metrics.loss).any():
            grouped[run.data, run.num_parameters or 0, run.model_name].append(run)
    plots = []
    for (data, _, model), members in sorted(grouped.items()):
        # One scale for all sizes trained on the same data: their curves are there to be compared.
        limits = _loss_limits([run for key, found in grouped.items() if key[0] == data for run in found])
        title = f"{data}, {model}" if data else model
        plots.append(
            PanelPlot(f"Training loss by step: {title}", partial(_draw_loss, title, members, limits, styles))
        )
    return Figure("loss_curves", plots)


def throughput(runs: Sequence[Run], styles: Styles) -> Figure:
    """One panel: a row for each model and method, a dot at each run's median and a bar over its middle half."""
    rows: Rows = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.metrics.speed_quartiles is not None:
            rows[run.num_parameters or 0, run.model_name][run.method].append(run)
    if not rows:
        return Figure("throughput", [])
    height = 0.85 + 0.2 * (1.4 * len(rows) + sum(len(methods) for methods in rows.values()))
    text = "Training throughput in tokens per second, for each model and method"
    return Figure("throughput", [PanelPlot(text, partial(_draw_throughput, rows, styles), (6.0, height))])


def _draw_accuracy(panel: Panel, highest: float, styles: Styles, axes: Axes) -> None:
    sizes = sorted({cell.num_parameters for cell in panel.cells})
    logs = [math.log(max(size, 1)) for size in sizes]
    margin = 0.1 * (logs[-1] - logs[0]) if len(sizes) > 1 else 0.7
    low, high = logs[0] - margin, logs[-1] + margin
    axes.set_xscale("log")
    axes.set_xlim(math.exp(low), math.exp(high))
    percent_axis(axes, highest)
    labels = []
    for index, method in enumerate(panel.methods):
        cells = panel.of_method(method)
        # Methods stand side by side, or their bars would hide each other.
        shift = (index - (len(panel.methods) - 1) / 2) * (high - low) * (0.015 if len(sizes) > 1 else 0.1)
        x = [cell.num_parameters * math.exp(shift) for cell in cells]
        seeds = [[score.accuracy for score in cell.scores()] for cell in cells]
        draw_points(axes, x, [cell.estimate for cell in cells], seeds, styles[method])
        labels.append((cells[-1].estimate.mean, label(method), styles[method].color))
    axes.xaxis.set_major_locator(FixedLocator([sizes[index] for index in apart(logs, (high - low) * 0.11)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("parameters", loc="right")
    headings(axes, panel.title, "strict accuracy")
    label_lines(axes, labels)


def _estimates_by_steps(cell: Cell) -> dict[int, Estimate]:
    return {num: estimate(scores) for num in cell.nums_of_steps if (scores := cell.scores(num_steps=num))}


def _draw_by_num_steps(title: str, cells: Sequence[Cell], highest: float, styles: Styles, axes: Axes) -> None:
    by_cell = [_estimates_by_steps(cell) for cell in cells]
    nums = sorted(set().union(*by_cell))
    percent_axis(axes, highest)
    axes.set_xlim(nums[0] - 0.5, nums[-1] + 0.5)
    labels = []
    for index, (cell, estimates) in enumerate(zip(cells, by_cell, strict=True)):
        if estimates:
            x = [num + (index - (len(cells) - 1) / 2) * 0.08 for num in estimates]
            seeds = [[score.accuracy for score in cell.scores(num_steps=num)] for num in estimates]
            draw_points(axes, x, list(estimates.values()), seeds, styles[cell.method])
            labels.append((estimates[max(estimates)].mean, label(cell.method), styles[cell.method].color))
    num_problems = {num: max(found[num].n for found in by_cell if num in found) for num in nums}
    shown = apart([float(num) for num in nums], (nums[-1] - nums[0] + 1) * 0.09)
    axes.xaxis.set_major_locator(FixedLocator([nums[index] for index in shown]))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda num, _: f"{num:g}\n{num_problems.get(round(num), 0)}")
    )
    axes.set_xlabel("steps; below, problems", loc="right")
    headings(axes, title, "strict accuracy")
    label_lines(axes, labels)


def _draw_loss(
    title: str, runs: Sequence[Run], limits: tuple[float, float], styles: Styles, axes: Axes
) -> None:
    low, high = limits
    ratio = high / low if low > 0 else 1.0
    if ratio > _LOG_RATIO:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.15, high * 1.15)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 300 else (1,)))
    else:
        axes.set_ylim(min(0.0, low), high * 1.05 or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    ends: dict[str, list[float]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (method_rank(run.method), run.name)):
        finite = np.isfinite(run.metrics.loss)
        steps, loss = run.metrics.steps[finite].astype(np.float64), run.metrics.loss[finite]
        color = styles[run.method].color
        curve = smooth(loss, 2 * max(2, len(loss) // 60) + 1)
        axes.plot(*thin(steps, loss, _NUM_RAW_BINS), color=color, linewidth=0.6, alpha=0.22, zorder=1)
        axes.plot(*thin(steps, curve, _NUM_RAW_BINS), color=color, linewidth=1.3, alpha=0.9, zorder=2)
        held_out = _held_out(run)
        axes.scatter(
            list(held_out),
            list(held_out.values()),
            s=12,
            color=PAPER,
            edgecolors=color,
            linewidths=0.9,
            zorder=3,
        )
        ends[run.method].append(float(curve[-1]))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.margins(x=0.02)
    axes.set_xlabel("optimizer steps", loc="right")
    headings(axes, title, "loss, nats per learned token")
    named = [(float(np.mean(end)), label(method), styles[method].color) for method, end in ends.items()]
    label_lines(axes, named)


def _held_out(run: Run) -> dict[int, float]:
    return {step: loss for step, loss in run.metrics.held_out_loss.items() if math.isfinite(loss)}


def _loss_limits(runs: Sequence[Run]) -> tuple[float, float]:
    losses = np.concatenate([np.append(run.metrics.loss, list(_held_out(run).values())) for run in runs])
    losses = losses[np.isfinite(losses)]
    return float(losses.min()), float(losses.max())


def _draw_throughput(rows: Rows, styles: Styles, axes: Axes) -> None:
    ticks, place = [], 0.0
    speeds = []
    for (_, model), methods in sorted(rows.items()):
        text: dict[str, Any] = {"color": INK, "fontweight": "bold", "ha": "right", "va": "center"}
        axes.annotate(
            shorten(model, 30), (0, place), (-4, 0), ("axes fraction", "data"), "offset points", **text
        )
        place += 1
        for method in sorted(methods, key=method_rank):
            style = styles[method]
            quartiles = [run.metrics.speed_quartiles for run in methods[method]]
            found = [three for three in quartiles if three is not None]
            nudges = spread([place] * len(found), min(0.18, 0.6 / len(found)))
            axes.hlines(
                nudges,
                [q[0] for q in found],
                [q[2] for q in found],
                color=style.color,
                linewidth=1.2,
                alpha=0.5,
            )
            axes.scatter(
                [q[1] for q in found],
                nudges,
                s=20,
                marker=style.marker,
                color=style.color,
                edgecolors=PAPER,
                linewidths=0.6,
            )
            ticks.append((place, method))
            speeds += [speed for q in found for speed in q]
            place += 1
        place += 0.4
    axes.set_ylim(place - 0.9, -0.6)
    if min(speeds) > 0 and max(speeds) / min(speeds) > _LOG_RATIO:
        axes.set_xscale("log")
        axes.set_xlim(min(speeds) / 1.5, max(speeds) * 1.5)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(speeds) / min(speeds) < 300 else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, 1.08 * max(speeds) or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.yaxis.set_major_locator(FixedLocator([where for where, _ in ticks]))
    axes.set_yticklabels([shorten(label(method), 30) for _, method in ticks])
    for tick, (_, method) in zip(axes.get_yticklabels(), ticks, strict=True):
        tick.set_color(styles[method].color)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.grid(True, axis="both")
    axes.set_xlabel("tokens per second", loc="right", color=MUTED)
    headings(axes, "Training throughput", "median step of each run; bars span the middle half of its steps")
