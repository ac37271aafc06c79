"""Everything a report says, computed once; the page, the figures and the files of numbers are made from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.report.analysis import Analyses, analyse
from trainer.report.certainty import Certainty, certainties
from trainer.report.comparison_table import Table, comparison_tables
from trainer.report.comparisons import CalculatorComparison, Comparison, compare, compare_calculators
from trainer.report.headline import Headline, headline
from trainer.report.results import Run
from trainer.report.scaling import Fit, fit_panels
from trainer.report.subquestions import Scorer
from trainer.report.summary import Panel
from trainer.report.summary import panels as panels_of


@dataclass(frozen=True)
class Content:
    title: str
    runs: tuple[Run, ...]
    panels: tuple[Panel, ...]
    analyses: Analyses
    headlines: tuple[Headline, ...]
    tables: tuple[Table, ...]
    comparisons: tuple[Comparison, ...]
    calculators: tuple[CalculatorComparison, ...]
    certainties: tuple[Certainty, ...]
    fits: tuple[Fit, ...]
    bertscore_model: str  # its name, "" without one


def content_of(title: str, runs: Sequence[Run], max_examples: int, bertscore_model: str) -> Content:
    """Raises UserError for damaged predictions and a BERTScore model that is not there."""
    panels = tuple(panels_of(runs))
    scorer = Scorer(bertscore_model)
    evaluations = [evaluation for panel in panels for evaluation in panel.evaluations]
    analyses = analyse(evaluations, max_examples, scorer)
    comparisons = tuple(compare(panels, analyses))
    return Content(
        title=title,
        runs=tuple(runs),
        panels=panels,
        analyses=analyses,
        headlines=tuple(headline(panel) for panel in panels),
        tables=tuple(comparison_tables(panels)),
        comparisons=comparisons,
        calculators=tuple(compare_calculators(panels, analyses)),
        certainties=tuple(certainties(panels, comparisons)),
        fits=tuple(fit_panels(panels, analyses)),
        bertscore_model=scorer.name,
    )
