"""Compute all frames that the page, the figures and the files of numbers are made from."""

from __future__ import annotations

from trainer.report import comparison, paired_tests, scaling, summary
from trainer.report.error_types import analyse
from trainer.report.load import Study
from trainer.report.subquestions import Scorer


class ReportData:
    """Frames of a report; the function that makes a frame documents its columns."""

    def __init__(self, title: str, study: Study, max_examples: int = 0, bertscore_model: str = "") -> None:
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
