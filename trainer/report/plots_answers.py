"""Figures over single answers: what went wrong, the calculator on and off, and the fitted curves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import offset_copy

from trainer.report.analysis import Analyses
from trainer.report.causes import CAUSES, LABELS, RIGHT
from trainer.report.comparisons import CalculatorComparison
from trainer.report.drawing import apart, headings, label_lines, percent_axis
from trainer.report.format import count, shorten
from trainer.report.methods import label
from trainer.report.plots import Figure, PanelPlot, Styles
from trainer.report.scaling import Fit
from trainer.report.style import INK, MUTED, PAPER, cause_styles
from trainer.report.summary import Panel

Bars = list[tuple[str, str, dict[str, float]]]  # model, method, class -> share of the problems
_WIDTH = 6.4  # inches, of figures with a row for each student
_ROW = 0.21


def cause_shares(panel: Panel, analyses: Analyses) -> Bars:
    """Share of right answers and of each cause, the mean over seeds; students without gold steps are left out."""
    bars = []
    for cell in panel.cells:
        counters = [causes for e in cell.evaluations if (causes := analyses[e.directory.path].causes)]
        total: Counter[str] = sum(counters, Counter())
        if total:
            shares = {name: total[name] / sum(total.values()) for name in (RIGHT, *CAUSES)}
            bars.append((cell.model_name, cell.method, shares))
    return bars


def what_went_wrong(panels: Sequence[Panel], analyses: Analyses, styles: Styles) -> Figure:
    """A panel for each set of problems: a stacked bar for each model and method."""
    plots = []
    for panel in panels:
        bars = cause_shares(panel, analyses)
        if bars:
            height = 1.5 + _ROW * (len(bars) + 1.4 * len({model for model, _, _ in bars}))
            text = f"What went wrong on {panel.title}: " + "; ".join(_in_words(*bar) for bar in bars)
            plots.append(PanelPlot(text, partial(_draw_causes, panel.title, bars, styles), (_WIDTH, height)))
    return Figure("what_went_wrong", plots)


def calculator(comparisons: Sequence[CalculatorComparison], styles: Styles) -> Figure:
    """A panel for each set of problems: two bars for each student, with the calculator and without."""
    plots = []
    for title in dict.fromkeys(comparison.panel for comparison in comparisons):
        pairs = [comparison for comparison in comparisons if comparison.panel == title]
        height = 1.0 + _ROW * (1.8 * len(pairs) + 1.4 * len({pair.model_name for pair in pairs}))
        text = f"Accuracy with and without the calculator on {title}"
        plots.append(PanelPlot(text, partial(_draw_calculator, title, pairs, styles), (_WIDTH, height)))
    return Figure("calculator", plots)


def scaling_fit(fits: Sequence[Fit], styles: Styles) -> Figure:
    """A panel for each set of problems: the fitted curves with their bands, and the means they were fitted to."""
    plots = []
    for title in dict.fromkeys(fit.panel for fit in fits if not fit.refusal):
        drawn = [fit for fit in fits if fit.panel == title and not fit.refusal]
        text = (
            f"Fitted accuracy against parameters on {title}, for {', '.join(label(f.method) for f in drawn)}"
        )
        plots.append(PanelPlot(text, partial(_draw_fits, title, drawn, styles)))
    return Figure("scaling_fit", plots)


def _in_words(model: str, method: str, shares: dict[str, float]) -> str:
    told = ", ".join(f"{LABELS[name]} {100 * share:.0f} %" for name, share in shares.items() if share)
    return f"{model}, {label(method)}: {told}"


def _draw_causes(title: str, bars: Bars, styles: Styles, axes: Axes) -> None:
    colors = {name: style.color for name, style in cause_styles().items()}
    places = _rows(axes, [(model, method) for model, method, _ in bars], 1.0, styles)
    for name in (*CAUSES, RIGHT):
        left = [
            sum(s[c] for c in CAUSES[: CAUSES.index(name)]) if name != RIGHT else 1 - s[RIGHT]
            for _, _, s in bars
        ]
        axes.barh(
            places, [s[name] for _, _, s in bars], left=left, height=0.72, color=colors[name],
            edgecolor=PAPER, linewidth=0.6, label=LABELS[name],
        )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    below = offset_copy(axes.transAxes, fig=axes.get_figure(root=True), y=-16, units="points")
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, ncols=3, frameon=False, fontsize=7.5,
        handlelength=1.0, handleheight=0.9, borderaxespad=0, columnspacing=1.4, labelcolor=MUTED,
    )  # fmt: skip
    headings(axes, title, "share of all problems: wrong by cause, then right")


def _draw_calculator(title: str, pairs: Sequence[CalculatorComparison], styles: Styles, axes: Axes) -> None:
    names = [(p.model_name, p.method) for p in pairs]
    places = _rows(axes, names, 1.8, styles)
    highest = 0.0
    for place, pair in zip(places, pairs, strict=True):
        color = styles[pair.method].color
        for shift, score, filled in ((-0.36, pair.on, True), (0.36, pair.off, False)):
            low, high = score.interval
            look: dict[str, Any] = {
                "color": color if filled else "none",
                "edgecolor": color,
                "linewidth": 0.9,
            }
            axes.barh([place + shift], [score.accuracy], height=0.62, **look)
            axes.hlines([place + shift], [low], [high], color=INK, linewidth=0.8)
            highest = max(highest, high)
    axes.set_xlim(0, min(1.0, 1.06 * highest))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    headings(axes, title, "strict accuracy; filled: with the calculator, outlined: without")


def _rows(axes: Axes, names: Sequence[tuple[str, str]], step: float, styles: Styles) -> list[float]:
    """A line with the name of each model, below it a row for each of its methods; returns the rows' places."""
    places, place, before = [], 0.0, ""
    for index, (model, _) in enumerate(names):
        if model != before or index == 0:
            place += 0.4 if index else 0.0
            text: dict[str, Any] = {"color": INK, "fontweight": "bold", "ha": "right", "va": "center"}
            at = ((0, place), (-4, 0), ("axes fraction", "data"), "offset points")
            axes.annotate(shorten(model, 30), *at, annotation_clip=False, **text)
            place, before = place + (1 + step) / 2, model
        places.append(place)
        place += step
    axes.set_ylim(place - step / 2, -0.6)
    axes.yaxis.set_major_locator(FixedLocator(places))
    axes.set_yticklabels([shorten(label(method), 30) for _, method in names])
    for tick, (_, method) in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_color(styles[method].color)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    return places


def _draw_fits(title: str, fits: Sequence[Fit], styles: Styles, axes: Axes) -> None:
    sizes = sorted({size for fit in fits for size in fit.sizes})
    axes.set_xscale("log")
    percent_axis(axes, max(row[3] for fit in fits for row in fit.curve))
    ends = []
    for fit in fits:
        style = styles[fit.method]
        x, mean, low, high = (list(column) for column in zip(*fit.curve, strict=True))
        axes.fill_between(x, low, high, color=style.color, alpha=0.14, linewidth=0)
        axes.plot(x, mean, color=style.color, linewidth=1.4)
        marks: dict[str, Any] = {"edgecolors": PAPER, "linewidths": 0.6, "zorder": 3, "clip_on": False}
        axes.scatter(fit.sizes, fit.accuracies, s=20, marker=style.marker, color=style.color, **marks)
        ends.append((mean[-1], label(fit.method), style.color))
    logs = [math.log(size) for size in sizes]
    shown = apart(logs, (logs[-1] - logs[0]) * 0.11)
    axes.set_xlim(min(fit.curve[0][0] for fit in fits), max(fit.curve[-1][0] for fit in fits))
    axes.xaxis.set_major_locator(FixedLocator([sizes[index] for index in shown]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("parameters", loc="right", color=MUTED)
    headings(axes, title, "strict accuracy, fitted")
    label_lines(axes, ends)
