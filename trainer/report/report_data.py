"""Compute all frames of the report, and make results.csv and results.json from them. Numbers are not rounded."""

import json

import pandas as pd

from trainer.problems.answers import ANSWER_RULES
from trainer.report import comparison, paired_tests, scaling, summary
from trainer.report.columns import to_dicts
from trainer.report.error_types import ERROR_TYPES, RIGHT, analyse
from trainer.report.load import StudyFrames
from trainer.report.subquestions import Scorer

REPORT_FORMAT = 1
_RESULTS = [
    *("study", "run", "train_data", "run_method", "model", "parameters", "total_parameters", "seed"),
    *("problems", "data", "split", "mode", "calculator", "temperature", "stopped_at"),
    *(f"{rule}_{number}" for rule in ANSWER_RULES for number in ("correct", "accuracy", "low", "high")),
    *("n", "unfinished_generations", "generated_tokens", "calculator_results_given", "evaluation_seconds"),
    *("training_steps", "learned_tokens", "final_loss", "late_loss_fall", "tokens_per_second"),
    "training_seconds",
    *("broken_metrics_lines", "non_finite_losses", "missing"),
]
_ESTIMATE = ["mean", "low", "high", "standard_error", "n", "num_seeds"]


class ReportData:
    """All frames and headlines of a report. The function that computes a frame documents the frame's columns.

    `summary` also has the column is_best (summary.best_methods). `certainty` has a list of sentences for each panel.

    `max_examples`: maximum number of predictions that the report shows. `bertscore_model`: local folder; "" means no
    BERTScore. The constructor raises UserError if predictions are damaged or the BERTScore model is missing.
    """

    def __init__(
        self, title: str, study: StudyFrames, max_examples: int = 0, bertscore_model: str = ""
    ) -> None:
        scorer = Scorer(bertscore_model)
        self.title = title
        self.study = study
        self.bertscore_model = scorer.name
        self.evaluations = study.evaluations
        self.predictions, quality = analyse(self.evaluations, max_examples, scorer)
        answers = paired_tests.predictions_by_evaluation(self.predictions)
        self.summary = summary.summarise(self.evaluations)
        self.by_num_steps = summary.summarise_by_num_steps(self.evaluations)
        self.error_types = summary.count_error_types(self.evaluations, self.predictions)
        self.subquestions = summary.question_quality(self.evaluations, quality)
        self.comparisons = paired_tests.compare_methods(self.evaluations, answers)
        self.calculators = paired_tests.compare_calculators(self.evaluations, answers)
        self.pairs = pairs = summary.compared_pairs(self.comparisons)
        self.summary["is_best"] = summary.best_methods(self.summary, pairs)
        self.uncertainty = summary.uncertainty(self.summary, pairs)
        self.fits = scaling.fit_curves(self.evaluations, answers)
        panels = [
            (cells, pairs[pairs["panel"] == title])
            for title, cells in self.summary.groupby("panel", sort=False)
        ]
        self.headlines = [summary.headline_parts(*panel) for panel in panels]
        self.certainty = [[*summary.contrasts(*panel), summary.seed_spread(panel[0])] for panel in panels]
        self.paper_tables = comparison.paper_tables(self.evaluations, self.summary)


def results_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return results.csv as a frame. The column `method` is the method of the run, not of the evaluation."""
    rows = runs.assign(total_parameters=runs["total_parameters"].fillna(runs["parameters"]))
    return rows[_RESULTS].rename(columns={"run_method": "method"})


def to_json(data: ReportData) -> str:
    """Return the text of results.json. NaN and infinities are null, because JSON does not have them."""
    named, tested = {"panel": "problems"}, {"model": "model_name", "parameters": "num_parameters"}
    cell = ["problems", "model", "parameters"]
    summarised = [*cell, "total_parameters", "method", *_ESTIMATE, "accuracies"]
    errors = ["problems", *summary.EVALUATION_KEYS[1:], RIGHT, *ERROR_TYPES, "n"]
    is_unfinished = data.study.runs["missing"] != ""
    frames = {
        "runs": results_table(data.study.runs),
        "summary": data.summary.rename(columns=named)[summarised],
        "comparison_table": comparison.comparison_rows(data.paper_tables),
        "by_num_steps": data.by_num_steps.rename(columns=named)[[*cell, "method", "num_steps", *_ESTIMATE]],
        "comparisons": data.comparisons.rename(columns=tested),
        "calculator": data.calculators.rename(columns=tested),
        "causes": data.error_types.rename(columns=named)[errors],
        "subquestions": data.subquestions.rename(columns=named),
        "certainty": data.uncertainty.rename(columns={"not_significant": "untold"}),
        "fits": data.fits,
        "unfinished": data.study.runs[is_unfinished].drop_duplicates("run_path")[["study", "run", "missing"]],
    }
    record = {
        "format": REPORT_FORMAT,
        "title": data.title,
        "headlines": [summary.headline_text(headline) for headline in data.headlines],
        **{name: to_dicts(rows) if isinstance(rows, pd.DataFrame) else rows for name, rows in frames.items()},
    }
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
    return json.dumps(finite, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
