"""Compute all frames of the report, and the files of numbers: results.csv and results.json, without rounding."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd

from trainer.report import comparison, paired_tests, scaling, summary
from trainer.report.columns import records
from trainer.report.error_types import ERROR_TYPES, RIGHT, analyse
from trainer.report.load import StudyFrames
from trainer.report.run_files import RULES
from trainer.report.subquestions import Scorer

FORMAT = 1
_RESULTS = [
    *("study", "run", "train_data", "run_method", "model", "parameters", "total_parameters", "seed"),
    *("problems", "data", "split", "mode", "calculator", "temperature", "stopped_at"),
    *(f"{rule}_{number}" for rule in RULES for number in ("correct", "accuracy", "low", "high")),
    *("n", "unfinished_generations", "generated_tokens", "calculator_results_given", "evaluation_seconds"),
    *("training_steps", "learned_tokens", "final_loss", "tokens_per_second", "training_seconds"),
    *("broken_metrics_lines", "non_finite_losses", "missing"),
]
_ESTIMATE = ["mean", "low", "high", "standard_error", "n", "num_seeds"]


class ReportData:
    """Frames of a report; the function that makes a frame documents its columns."""

    def __init__(
        self, title: str, study: StudyFrames, max_examples: int = 0, bertscore_model: str = ""
    ) -> None:
        """Raise UserError for damaged predictions and a missing BERTScore model."""
        scorer = Scorer(bertscore_model)
        self.title = title
        self.study = study
        self.bertscore_model = scorer.name
        self.evaluations = study.evaluations
        self.predictions, quality = analyse(self.evaluations, max_examples, scorer)
        answers = paired_tests.answers_by_evaluation(self.predictions)
        self.summary = summary.summarise(self.evaluations)
        self.by_num_steps = summary.summarise_by_num_steps(self.evaluations)
        self.error_types = summary.count_error_types(self.evaluations, self.predictions)
        self.subquestions = summary.question_quality(self.evaluations, quality)
        self.comparisons = paired_tests.compare_methods(self.evaluations, answers)
        self.calculators = paired_tests.compare_calculators(self.evaluations, answers)
        self.significance = summary.significance(self.summary, self.comparisons)
        self.fits = scaling.fit_curves(self.evaluations, answers)
        panels = [panel for _, panel in self.summary.groupby("panel", sort=False)]
        self.headlines = [summary.headline(panel) for panel in panels]
        self.comparison_tables = comparison.comparison_tables(self.evaluations, self.summary)


def result_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """Return results.csv as a frame: a row per run and evaluation. Its column `method` is the run's method."""
    rows = runs.assign(total_parameters=runs["total_parameters"].fillna(runs["parameters"]))
    return rows[_RESULTS].rename(columns={"run_method": "method"})


def to_csv(rows: pd.DataFrame) -> str:
    """Return a frame as CSV, "" without rows."""
    return "" if rows.empty else rows.to_csv(index=False, lineterminator="\n")


def to_json(data: ReportData) -> str:
    """Return results.json."""
    named, tested = {"panel": "problems"}, {"model": "model_name", "parameters": "num_parameters"}
    runs = data.study.runs
    evaluated = [named.get(name, name) for name in summary.EVALUATED]
    cell = ["problems", "model", "parameters"]
    cells, by_steps = data.summary.rename(columns=named), data.by_num_steps.rename(columns=named)
    errors, questions = data.error_types.rename(columns=named), data.subquestions.rename(columns=named)
    unfinished = runs[runs["missing"] != ""].drop_duplicates("run_path")
    record = {
        "format": FORMAT,
        "title": data.title,
        "headlines": [summary.headline_text(headline) for headline in data.headlines],
        "runs": records(result_rows(runs)),
        "summary": records(cells[[*cell, "total_parameters", "method", *_ESTIMATE, "accuracies"]]),
        "comparison_table": comparison.comparison_rows(data.comparison_tables),
        "by_num_steps": records(by_steps[[*cell, "method", "num_steps", *_ESTIMATE]]),
        "comparisons": records(data.comparisons.rename(columns=tested)),
        "calculator": records(data.calculators.rename(columns=tested)),
        "causes": records(errors[[*evaluated, RIGHT, *ERROR_TYPES, "n"]]),
        "subquestions": records(questions),
        "certainty": records(data.significance.rename(columns={"not_significant": "untold"})),
        "fits": records(data.fits),
        "unfinished": records(unfinished[["study", "run", "missing"]]),
    }
    return json.dumps(_without_nan(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    """Return the value with null for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
