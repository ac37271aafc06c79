"""Render index.html: templates filled with prepared values. The templates escape everything from a run directory."""

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
from trainer.report.methods import PAIRS, base, label
from trainer.report.provenance import facts_by_run, remarks
from trainer.report.report_data import ReportData
from trainer.report.summary import significance_text
from trainer.report.tables import result_rows


def render_page(data: ReportData, figures: dict[str, list[Panel]], styles: Styles) -> str:
    """Return index.html with style sheet, figures, predictions and script inside; it loads nothing."""
    runs = data.study.runs.drop_duplicates("run_path")
    examples = example_viewer.viewer_data(data)
    script = _read("example_viewer.js")
    # "method: CSS variable" for the script, which draws method names as the templates do.
    variables = {method: style.variable for method, style in styles.items()}
    shared, own = facts_by_run(data.study)
    values = {
        **{"title": data.title, "num_runs": len(runs), "version": trainer.__version__},
        "sections": _sections(data, figures, bool(examples["predictions"])),
        "style_sheet": Markup(_variables(styles) + _read("page.css")),
        "script": Markup(script),
        "script_digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **{"viewer": examples, "examples": Markup(example_viewer.embedded_json(examples))},
        **{"variables": variables, "variables_json": json.dumps(variables)},
        "figures": {
            name: list(map(Markup, inline_panels(name, panels, styles | error_type_styles())))
            for name, panels in figures.items()
        },
        "files": {name: (f"{name}.svg", f"{name}.png") for name in figures},
        "headlines": data.headlines,
        **{
            "rows": records(result_rows(data.study.runs)),
            "num_steps_tables": _num_steps_tables(data.by_num_steps),
        },
        "summary": records(data.summary.rename(columns={"panel": "problems"})),
        "pairs": any(base(method) in PAIRS for method in data.summary["method"]),
        "quality": records(data.subquestions.rename(columns={"panel": "problems"})),
        **{"comparison_tables": data.comparison_tables, "paper": paper_values()},
        **{"comparisons": records(data.comparisons), "calculators": records(data.calculators)},
        **{"significance": records(data.significance), "fits": records(data.fits)},
        **{
            "num_resamples": scaling.NUM_RESAMPLES,
            "resampling_seed": scaling.SEED,
            "min_sizes": scaling.MIN_SIZES,
        },
        **{"error_labels": LABELS, "num_predictions": len(data.predictions)},
        "bertscore_model": data.bertscore_model,
        "several_studies": runs["study"].nunique() > 1,
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


def _sections(data: ReportData, figures: dict[str, list[Panel]], has_examples: bool) -> dict[str, str]:
    """Return {anchor and template block: title} of the sections of this page, in order."""
    is_evaluated = not data.summary.empty
    sections = {
        ("comparison", "The comparison"): is_evaluated,
        ("accuracy", "Accuracy against parameters"): is_evaluated,
        ("fits", "Accuracy as a function of size"): is_evaluated,
        ("certainty", "What a difference means"): is_evaluated,
        ("num_steps", "Accuracy by number of steps"): "accuracy_by_num_steps" in figures,
        ("errors", "What went wrong"): not data.predictions.empty,
        ("calculator", "With and without the calculator"): not data.calculators.empty,
        ("subquestions", "Quality of the sub-questions"): not data.subquestions.empty,
        ("examples", "Examples"): has_examples,
        ("loss", "Training loss"): "loss_curves" in figures,
        ("throughput", "Throughput"): "throughput" in figures,
        ("runs", "All runs"): True,
        ("unfinished", "Unfinished runs"): bool((data.study.runs["missing"] != "").any()),
        ("provenance", "How it was made"): True,
    }
    return dict(names for names, is_there in sections.items() if is_there)


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
            (student, {row["num_steps"]: row for row in records(found)})
            for student, found in cells.groupby(["model", "method"], sort=False)
        ]
        tables.append({"title": title, "nums": sorted(cells["num_steps"].unique()), "rows": rows})
    return tables
