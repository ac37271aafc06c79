"""The page: a template filled with prepared values. Everything from a run directory is escaped by the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

import trainer
from trainer.report import format
from trainer.report.comparisons import Comparison
from trainer.report.headline import Headline
from trainer.report.metrics import STEPS_OF_FINAL_LOSS
from trainer.report.provenance import own_facts, remarks, shared_facts
from trainer.report.results import Run
from trainer.report.style import NEUTRALS, MethodStyle
from trainer.report.summary import Panel
from trainer.report.tables import num_steps_rows, run_rows, summary_rows


@dataclass(frozen=True)
class FigureOnPage:
    panels: list[str]  # SVG elements made by render.py
    files: tuple[str, str]  # to link to


def page(
    title: str,
    headlines: Sequence[Headline],
    runs: Sequence[Run],
    panels: Sequence[Panel],
    comparisons: Sequence[Comparison],
    figures: dict[str, FigureOnPage],
    styles: dict[str, MethodStyle],
) -> str:
    """The whole of index.html: style sheet and figures inside, no script, nothing loaded from anywhere."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": format.count,
        "percent": format.percent,
        "interval": lambda row: format.interval(row["low"], row["high"]),
        "p_value": format.p_value,
        "seconds": format.seconds,
    }
    folder = resources.files("trainer.report")
    template = environment.from_string((folder / "template.html.j2").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        version=trainer.__version__,
        style_sheet=Markup(_variables(styles) + (folder / "page.css").read_text(encoding="utf-8")),
        headlines=headlines,
        runs=runs,
        variables={method: style.variable for method, style in styles.items()},
        figures={name: [Markup(panel) for panel in figure.panels] for name, figure in figures.items()},
        files={name: figure.files for name, figure in figures.items()},
        rows=run_rows(runs),
        summary=summary_rows(panels),
        step_tables=_step_tables(panels),
        comparisons=comparisons,
        several_studies=len({run.study for run in runs}) > 1,
        unfinished=[run for run in runs if run.unfinished],
        remarks=remarks(runs),
        shared_facts=shared_facts(runs),
        own_facts=own_facts(runs),
        steps_of_final_loss=STEPS_OF_FINAL_LOSS,
    )


def _variables(styles: dict[str, MethodStyle]) -> str:
    """CSS variables for the colours of style.py, light ones and, on dark screens, dark ones."""
    light = {name: colors[0] for name, colors in NEUTRALS.items()} | {
        s.variable: s.color for s in styles.values()
    }
    dark = {name: colors[1] for name, colors in NEUTRALS.items()} | {
        s.variable: s.dark for s in styles.values()
    }

    def block(colors: dict[str, str]) -> str:
        return ":root { " + " ".join(f"--{name}: {color};" for name, color in colors.items()) + " }"

    return f"{block(light)}\n@media screen and (prefers-color-scheme: dark) {{ {block(dark)} }}\n"


def _step_tables(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """For each panel a table: a row for each model and method, a column for each number of steps."""
    tables = []
    for panel in panels:
        found = num_steps_rows([panel])
        nums = sorted({row["num_steps"] for row in found})
        rows: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
        for row in found:
            rows.setdefault((row["model"], row["method"]), {})[row["num_steps"]] = row
        if nums:
            tables.append({"title": panel.title, "nums": nums, "rows": list(rows.items())})
    return tables
