"""The page: templates filled with prepared values. Everything from a run directory is escaped by the templates."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

import trainer
from trainer.report import causes, format, scaling
from trainer.report.browser import browser_data, embedded
from trainer.report.content import Content
from trainer.report.methods import PAIRS, base, label
from trainer.report.metrics import STEPS_OF_FINAL_LOSS
from trainer.report.provenance import own_facts, remarks, shared_facts
from trainer.report.style import GOOD, NEUTRALS, MethodStyle, cause_styles
from trainer.report.summary import Panel
from trainer.report.tables import num_steps_rows, quality_rows, run_rows, summary_rows
from trainer.report.targets import load_targets

_FOLDER = resources.files("trainer.report") / "page"


@dataclass(frozen=True)
class FigureOnPage:
    panels: list[str]  # SVG elements made by render.py
    files: tuple[str, str]  # to link to


@dataclass(frozen=True)
class Section:
    """`name` is its anchor and, with .html.j2, its template."""

    name: str
    title: str


def page(content: Content, figures: dict[str, FigureOnPage], styles: dict[str, MethodStyle]) -> str:
    """The whole of index.html: style sheet, figures, predictions and script inside, nothing loaded from anywhere."""
    runs, panels, analyses = content.runs, content.panels, content.analyses
    data = browser_data(panels, analyses)
    script = _read("browser.js")
    rows = run_rows(runs)
    # The style is named as "name: CSS variable" for the script, which draws method names as the templates do.
    variables = {method: style.variable for method, style in styles.items()}
    values = {
        **{"content": content, "title": content.title, "runs": runs, "version": trainer.__version__},
        "sections": _sections(content, figures, bool(data["predictions"])),
        "style_sheet": Markup(_variables(styles) + _read("page.css") + _read("browser.css")),
        "script": Markup(script),
        "script_digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **{"examples": Markup(embedded(data)), "browser": data},
        **{"variables": variables, "variables_json": json.dumps(variables)},
        "figures": {name: [Markup(panel) for panel in figure.panels] for name, figure in figures.items()},
        "files": {name: figure.files for name, figure in figures.items()},
        **{"rows": rows, "summary": summary_rows(panels), "step_tables": _step_tables(panels)},
        "pairs": any(base(cell.method) in PAIRS for panel in panels for cell in panel.cells),
        **{"quality": quality_rows(panels, analyses), "targets": load_targets(), "scaling": scaling},
        **{"causes": causes, "num_predictions": sum(len(a.answers or ()) for a in analyses.values())},
        "several_studies": len({run.study for run in runs}) > 1,
        "unfinished": [run for run in runs if run.unfinished],
        "remarks": remarks(runs, analyses),
        **{"shared_facts": shared_facts(runs), "own_facts": own_facts(runs)},
        "steps_of_final_loss": STEPS_OF_FINAL_LOSS,
    }
    return _environment().get_template("page.html.j2").render(values)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": format.count,
        "percent": format.percent,
        "interval": lambda row: format.interval(row["low"], row["high"]),
        "p_value": format.p_value,
        "seconds": format.seconds,
        "label": label,
        "points": lambda fraction: f"{100 * fraction:+.1f}".replace("-", "−"),
    }
    return environment


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _sections(content: Content, figures: dict[str, FigureOnPage], examples: bool) -> list[Section]:
    """What this page has, in the order of the page."""
    evaluated = bool(content.panels)
    with_predictions = any(a.answers is not None for a in content.analyses.values())
    sections = {
        ("comparison", "The comparison"): evaluated,
        ("accuracy", "Accuracy against parameters"): evaluated,
        ("fits", "Accuracy as a function of size"): evaluated,
        ("certainty", "What a difference means"): evaluated,
        ("num_steps", "Accuracy by number of steps"): "accuracy_by_num_steps" in figures,
        ("errors", "What went wrong"): with_predictions,
        ("calculator", "With and without the calculator"): bool(content.calculators),
        ("subquestions", "Quality of the sub-questions"): any(a.quality for a in content.analyses.values()),
        ("examples", "Examples"): examples,
        ("loss", "Training loss"): "loss_curves" in figures,
        ("throughput", "Throughput"): "throughput" in figures,
        ("runs", "All runs"): True,
        ("unfinished", "Unfinished runs"): any(run.unfinished for run in content.runs),
        ("provenance", "How it was made"): True,
    }
    return [Section(*names) for names, there in sections.items() if there]


def _variables(styles: dict[str, MethodStyle]) -> str:
    """CSS variables for the colours of style.py, light ones and, on dark screens, dark ones."""
    named = [*styles.values(), *cause_styles().values()]
    pairs = {**NEUTRALS, "good": GOOD} | {style.variable: (style.color, style.dark) for style in named}

    def block(shade: int) -> str:
        return ":root { " + " ".join(f"--{name}: {pair[shade]};" for name, pair in pairs.items()) + " }"

    return f"{block(0)}\n@media screen and (prefers-color-scheme: dark) {{ {block(1)} }}\n"


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
