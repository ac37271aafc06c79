"""Render index.html from templates. All texts that come from the run directories are escaped."""

import base64
import hashlib
import json
import re
from importlib import resources

import jinja2
import pandas as pd
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape

import trainer
from trainer.report import example_viewer, format, scaling
from trainer.report.columns import to_dicts
from trainer.report.comparison import paper_values
from trainer.report.drawing import GOOD, NEUTRALS, Panel, Styles, error_type_styles, inline_panels
from trainer.report.error_types import LABELS
from trainer.report.load import STEPS_OF_FINAL_LOSS
from trainer.report.methods import PAIR_METHODS, explanation, label, method_order, without_guidance
from trainer.report.provenance import facts_by_run, remarks, totals
from trainer.report.report_data import ReportData
from trainer.report.summary import CELL_KEYS, uncertainty_text

# Matplotlib marker -> a character of about the same form.
_MARKERS = dict(zip("osD^vXPphd*8><", "●■◆▲▼✖✚⬟⬢♦★⯃▶◀", strict=True))


def render_page(data: ReportData, figures: dict[str, list[Panel]], styles: Styles) -> str:
    """Return the text of index.html. The page contains style sheet, figures, predictions and script; it loads no other file."""
    runs = data.study.runs.drop_duplicates("run_path")
    viewer = example_viewer.viewer_data(data.evaluations, data.predictions)
    # ASCII JSON without `<`, `>` and `&`, so that model output cannot close the page's script element.
    examples = htmlsafe_json_dumps(viewer, separators=(",", ":"), allow_nan=False)
    script = _read("example_viewer.js")
    # Method -> CSS variable of its colour, for the script and the templates.
    variables = {method: style.variable for method, style in styles.items()}
    by_num_steps = [to_dicts(rows) for _, rows in data.by_num_steps.groupby(CELL_KEYS, sort=False)]
    shared, own = facts_by_run(data.study)
    values = {
        **{name: to_dicts(v) if isinstance(v, pd.DataFrame) else v for name, v in vars(data).items()},
        **{"num_runs": len(runs), "num_predictions": len(data.predictions), "version": trainer.__version__},
        "style_sheet": Markup(_variables(styles) + _read("page.css")),
        "script": Markup(script),
        "script_digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **{"viewer": viewer, "examples": examples},
        **{"variables": variables, "variables_json": json.dumps(variables)},
        "figures": {
            name: list(map(Markup, inline_panels(name, panels, styles | error_type_styles())))
            for name, panels in figures.items()
        },
        "trainings": to_dicts(runs[runs["training_steps"] > 0]),
        "num_steps_rows": [{**cells[0], "cells": cells} for cells in by_num_steps],
        "has_pairs": any(without_guidance(method) in PAIR_METHODS for method in data.summary["method"]),
        "has_seeds": bool((data.summary["num_seeds"] > 1).any()),
        "has_best": bool(data.summary["is_best"].any()),
        "markers": {method: _MARKERS[style.marker] for method, style in styles.items()},
        "methods": sorted(styles, key=method_order),
        "legends": {name: [entry[0] for entry in panels[0].legend] for name, panels in figures.items()},
        **{"paper": paper_values(), "scaling": scaling, "error_labels": LABELS},
        "has_several_studies": runs["study"].nunique() > 1,
        "unfinished": to_dicts(runs[runs["missing"] != ""]),
        **{"remarks": remarks(data), "totals": totals(data.study), "shared_facts": shared},
        "own_facts": own,
        "steps_of_final_loss": STEPS_OF_FINAL_LOSS,
    }
    return _environment(list(styles), variables).get_template("sections.html.j2").render(values)


def _environment(methods: list[str], variables: dict[str, str]) -> jinja2.Environment:
    names = {label(method): variables[method] for method in methods}
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    name = re.compile(rf"(?<![\w+])({'|'.join(longest_first)})(?![\w+])")

    def mark_methods(text: str) -> Markup:
        """Return a text of ours as HTML, in which the names of methods look as everywhere on the page."""
        spans = [
            Markup('<span class="method" style="color: var(--{})">{}</span>').format(names[part], part)
            if index % 2
            else escape(part)
            for index, part in enumerate(name.split(text) if methods else [text])
        ]
        return Markup("").join(spans)

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        **{"count": format.count, "percent": format.percent, "p_value": format.p_value},
        **{"seconds": format.seconds, "label": label, "uncertainty_text": uncertainty_text},
        **{"mark_methods": mark_methods, "explanation": explanation},
        "interval": lambda row: format.interval(row["low"], row["high"]),
        "points": lambda fraction: f"{100 * fraction:+.1f}".replace("-", "−"),
    }
    return environment


def _read(name: str) -> str:
    return (resources.files("trainer.report") / "templates" / name).read_text(encoding="utf-8")


def _variables(styles: Styles) -> str:
    """Return CSS that defines the colours of drawing.py as variables, for light mode and for dark mode."""
    named = [*styles.values(), *error_type_styles().values()]
    pairs = {**NEUTRALS, "good": GOOD} | {style.variable: (style.color, style.dark) for style in named}

    def block(shade: int) -> str:
        return ":root { " + " ".join(f"--{name}: {pair[shade]};" for name, pair in pairs.items()) + " }"

    return f"{block(0)}\n@media screen and (prefers-color-scheme: dark) {{ {block(1)} }}\n"
