"""Compute all frames that the page, the figures and the files of numbers are made from."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from trainer.report import comparison, paired_tests, scaling, summary
from trainer.report.error_types import ERROR_TYPES, RIGHT, analyse
from trainer.report.load import Study
from trainer.report.statistics import wilson_interval
from trainer.report.subquestions import Scorer

STUDENT = ["panel", "model", "parameters", "total_parameters", "method", "seed"]


@dataclass(frozen=True)
class ReportData:
    """Frames of a report; the function that makes a frame documents its columns."""

    title: str
    study: Study
    evaluations: pd.DataFrame  # Study.evaluations
    predictions: pd.DataFrame  # error_types.analyse
    summary: pd.DataFrame  # summary.summarise
    by_num_steps: pd.DataFrame  # summary.summarise_by_num_steps
    error_types: pd.DataFrame  # count_error_types
    subquestions: pd.DataFrame  # question_quality
    comparisons: pd.DataFrame  # paired_tests.compare_methods
    calculators: pd.DataFrame  # paired_tests.compare_calculators
    significance: pd.DataFrame  # summary.significance
    fits: pd.DataFrame  # scaling.fit_curves
    headlines: list[dict]  # summary.headline, by panel
    comparison_tables: list[comparison.ComparisonTable]
    bertscore_model: str  # name, "" without one


def compute(title: str, study: Study, max_examples: int = 0, bertscore_model: str = "") -> ReportData:
    """Return the data of a report. Raises UserError for damaged predictions and a missing BERTScore model."""
    scorer = Scorer(bertscore_model)
    evaluations = study.evaluations
    predictions, quality = analyse(evaluations, max_examples, scorer)
    answers = paired_tests.answers_by_evaluation(predictions)
    cells = summary.summarise(evaluations)
    comparisons = paired_tests.compare_methods(evaluations, answers)
    return ReportData(
        title=title,
        study=study,
        evaluations=evaluations,
        predictions=predictions,
        summary=cells,
        by_num_steps=summary.summarise_by_num_steps(evaluations),
        error_types=count_error_types(evaluations, predictions),
        subquestions=question_quality(evaluations, quality),
        comparisons=comparisons,
        calculators=paired_tests.compare_calculators(evaluations, answers),
        significance=summary.significance(cells, comparisons),
        fits=scaling.fit_curves(evaluations, answers),
        headlines=[summary.headline(panel) for _, panel in cells.groupby("panel", sort=False)],
        comparison_tables=comparison.comparison_tables(evaluations, cells),
        bertscore_model=scorer.name,
    )


def count_error_types(evaluations: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Return a row per evaluation with gold steps: STUDENT, the number of right answers and of each error type, n."""
    counts = predictions.groupby(["evaluation", "error_type"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=[RIGHT, *ERROR_TYPES], fill_value=0)
    return _students(evaluations).join(counts.assign(n=counts.sum(axis=1)), how="inner")


def question_quality(evaluations: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """Return a row per evaluation whose student wrote sub-questions.

    Columns: STUDENT, asking_model, those of subquestions.score_questions, right_number_share, low, high (its 95 %
    Wilson interval).
    """
    if quality.empty:
        return quality
    asking = [
        next((member["model_name"] for member in row.members if member["role"] == "decomposer"), row.model)
        for row in evaluations.itertuples()
    ]
    found = (
        _students(evaluations).assign(asking_model=asking).join(quality.set_index("evaluation"), how="inner")
    )
    low, high = wilson_interval(found["right_number"], found["n"])
    return found.assign(right_number_share=found["right_number"] / found["n"], low=low, high=high)


def _students(evaluations: pd.DataFrame) -> pd.DataFrame:
    return evaluations.drop(columns="seed").rename(columns={"train_seed": "seed"})[STUDENT]
