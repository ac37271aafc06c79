"""Render index.html from templates, which escape all texts of the run directories."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

import trainer
from trainer.report import example_viewer, format, scaling
from trainer.report.columns import records
from trainer.report.comparison import paper_values
from trainer.report.drawing import GOOD, NEUTRALS, Panel, Styles, error_type_styles, inline_panels
from trainer.report.error_types import LABELS
from trainer.report.load import STEPS_OF_FINAL_LOSS
from trainer.report.methods import PAIRS, label, without_guidance
from trainer.report.provenance import facts_by_run, remarks
from trainer.report.report_data import ReportData, result_rows
from trainer.report.summary import significance_text


def render_page(data: ReportData, figures: dict[str, list[Panel]], styles: Styles) -> str:
    """Return index.html with style sheet, figures, predictions and script inside; it loads nothing."""
    runs = data.study.runs.drop_duplicates("run_path")
    examples = example_viewer.viewer_data(data)
    script = _read("example_viewer.js")
    # "method: CSS variable" for the script, which draws method names as the templates do.
    variables = {method: style.variable for method, style in styles.items()}
    shared, own = facts_by_run(data.study)
    values = {
        **{name: records(v) if isinstance(v, pd.DataFrame) else v for name, v in vars(data).items()},
        **{"num_runs": len(runs), "num_predictions": len(data.predictions), "version": trainer.__version__},
        "style_sheet": Markup(_variables(styles) + _read("page.css")),
        "script": Markup(script),
        "script_digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **{"viewer": examples, "examples": Markup(example_viewer.embedded_json(examples))},
        **{"variables": variables, "variables_json": json.dumps(variables)},
        "figures": {
            name: list(map(Markup, inline_panels(name, panels, styles | error_type_styles())))
            for name, panels in figures.items()
        },
        "rows": records(result_rows(data.study.runs)),
        "num_steps_tables": _num_steps_tables(data.by_num_steps),
        "has_pairs": any(without_guidance(method) in PAIRS for method in data.summary["method"]),
        **{"paper": paper_values(), "scaling": scaling, "error_labels": LABELS},
        "has_several_studies": runs["study"].nunique() > 1,
        "unfinished": records(runs[runs["missing"] != ""]),
        **{"remarks": remarks(data), "shared_facts": shared, "own_facts": own},
        "steps_of_final_loss": STEPS_OF_FINAL_LOSS,
    }
    return _environment().get_template("sections.html.j2").render(values)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        **{"count": format.count, "percent": format.percent, "p_value": format.p_value},
        **{"seconds": format.seconds, "label": label, "significance_text": significance_text},
        "interval": lambda row: format.interval(row["low"], row["high"]),
        "points": lambda fraction: f"{100 * fraction:+.1f}".replace("-", "−"),
    }
    return environment


def _read(name: str) -> str:
    return (resources.files("trainer.report") / "templates" / name).read_text(encoding="utf-8")


def _variables(styles: Styles) -> str:
    """Return CSS variables for the colours of drawing.py, light ones and, on dark screens, dark ones."""
    named = [*styles.values(), *error_type_styles().values()]
    pairs = {**NEUTRALS, "good": GOOD} | {style.variable: (style.color, style.dark) for style in named}

    def block(shade: int) -> str:
        return ":root { " + " ".join(f"--{name}: {pair[shade]};" for name, pair in pairs.items()) + " }"

    return f"{block(0)}\n@media screen and (prefers-color-scheme: dark) {{ {block(1)} }}\n"


def _num_steps_tables(by_num_steps: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table per panel: a row per (model, method), a column per number of steps."""
    tables = []
    for title, cells in by_num_steps.groupby("panel", sort=False):
        rows = [
            (key, {row["num_steps"]: row for row in records(found)})
            for key, found in cells.groupby(["model", "method"], sort=False)
        ]
        tables.append({"title": title, "nums": sorted(cells["num_steps"].unique()), "rows": rows})
    return tables
