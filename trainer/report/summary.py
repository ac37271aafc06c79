"""Accuracies over seeds, error types, sub-question quality, and the findings in words."""

from __future__ import annotations

import itertools
from typing import Any

import pandas as pd

from trainer.report import format
from trainer.report.error_types import ERROR_TYPES, RIGHT
from trainer.report.methods import label
from trainer.report.statistics import estimates, half_width, wilson_interval

CELL = ["panel", "model", "parameters", "method"]  # one method with one model on one panel: a row per seed
EVALUATED = [
    "panel",
    "model",
    "parameters",
    "total_parameters",
    "method",
    "seed",
]  # `seed` of the evaluated model
LEVEL = 0.05
_MANY_PROBLEMS = 1000  # from this number on, accuracies have a digit after the point
_MAX_NAMED = 3  # pairs of methods


def summarise(evaluations: pd.DataFrame) -> pd.DataFrame:
    """Return the strict accuracy over seeds of each CELL, ordered by panel, size, model and method.

    Columns: CELL, total_parameters (of all models that answer together), and those of statistics.estimates.
    """
    found = estimates(evaluations.rename(columns={"strict_correct": "correct"}), CELL)
    largest = evaluations.groupby(CELL, sort=False)["total_parameters"].max()
    found.insert(3, "total_parameters", largest.to_numpy())
    return found


def summarise_by_num_steps(evaluations: pd.DataFrame) -> pd.DataFrame:
    """Return the strict accuracy over seeds by CELL and num_steps, the steps of the gold solution (from 1 on)."""
    rows = [
        (*cell, num, correct, n)
        for *cell, by_num_steps in evaluations[[*CELL, "by_num_steps"]].itertuples(index=False)
        for num, (correct, n) in by_num_steps.items()
        if num > 0 and n
    ]
    scores = pd.DataFrame(rows, columns=[*CELL, "num_steps", "correct", "n"])
    order = scores.assign(cell=scores.groupby(CELL, sort=False).ngroup()).sort_values(
        ["cell", "num_steps"], kind="stable"
    )
    return estimates(scores.loc[order.index], [*CELL, "num_steps"])


def count_error_types(evaluations: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Return a row per evaluation with gold steps: EVALUATED, the number of right answers and of each error type, n."""
    counts = predictions.groupby(["evaluation", "error_type"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=[RIGHT, *ERROR_TYPES], fill_value=0)
    return _evaluated(evaluations)[EVALUATED].join(counts.assign(n=counts.sum(axis=1)), how="inner")


def question_quality(evaluations: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """Return a row per evaluation of models that write sub-questions.

    Columns: EVALUATED, asking_model (that writes them), those of subquestions.score_questions, right_number_share, low,
    high (its 95 % Wilson interval).
    """
    if quality.empty:
        return quality
    found = _evaluated(evaluations)[[*EVALUATED, "asking_model"]]
    found = found.join(quality.set_index("evaluation"), how="inner")
    low, high = wilson_interval(found["right_number"], found["n"])
    return found.assign(right_number_share=found["right_number"] / found["n"], low=low, high=high)


def _evaluated(evaluations: pd.DataFrame) -> pd.DataFrame:
    asking = [
        next((member["model_name"] for member in row.members if member["role"] == "decomposer"), row.model)
        for row in evaluations.itertuples()
    ]
    return evaluations.assign(seed=evaluations["train_seed"], asking_model=pd.Series(asking, dtype=object))


def headline(panel: pd.DataFrame) -> dict[str, Any]:
    """Return the result of one panel's summary in words: lead, findings (method, accuracy, interval), tail, verdict.

    The findings are those of the largest model that has several methods, or else of the largest model.
    """
    models = panel.groupby(["parameters", "model"])["method"].size()
    size, model = (models[models > 1] if (models > 1).any() else models).index[-1]
    cells = panel[(panel["parameters"] == size) & (panel["model"] == model)]
    cells = cells.sort_values("mean", ascending=False, kind="stable")
    smallest, largest, seeds = cells["n"].min(), cells["n"].max(), cells["num_seeds"].max()
    digits = 1 if smallest >= _MANY_PROBLEMS else 0
    n = f"n = {smallest}" if smallest == largest else f"n = {smallest} to {largest}"
    return {
        "lead": f"On {panel['panel'].iat[0]}, with {format.count(size)} parameters:",
        "findings": [
            (cell.method, format.percent(cell.mean, digits), format.interval(cell.low, cell.high, digits))
            for cell in cells.itertuples()
        ],
        "tail": f"({n}{f', mean of {seeds} seeds' if seeds > 1 else ''})",
        "verdict": _verdict(cells),
    }


def headline_text(parts: dict[str, Any]) -> str:
    """Return a headline as one line."""
    findings = ", ".join(
        f"{label(method)} {accuracy} {low_high}" for method, accuracy, low_high in parts["findings"]
    )
    return f"{parts['lead']} {findings} {parts['tail']}. {parts['verdict']}".strip()


def _verdict(cells: pd.DataFrame) -> str:
    pairs = list(itertools.combinations(cells.itertuples(), 2))
    overlapping = [
        (label(a.method), label(b.method)) for a, b in pairs if a.low <= b.high and b.low <= a.high
    ]
    if not pairs:
        return ""
    if len(pairs) == 1:
        return f"The two 95 % intervals {'overlap' if overlapping else 'do not overlap'}."
    if not overlapping:
        return "No two of the 95 % intervals overlap."
    if len(overlapping) == len(pairs):
        return "All of the 95 % intervals overlap one another."
    if len(overlapping) > _MAX_NAMED:
        return f"{len(overlapping)} of the {len(pairs)} pairs of 95 % intervals overlap."
    named = ", and of ".join(f"{a} and {b}" for a, b in overlapping)
    return f"The 95 % intervals of {named} overlap; no others do."


def significance(summary: pd.DataFrame, comparisons: pd.DataFrame) -> pd.DataFrame:
    """Return a row per panel: the uncertainty of its best accuracy, and the pairs whose difference is not significant.

    Columns: panel, n, accuracy (the best), half_width and worst_half_width (at 50 %; both fractions, of 95 % Wilson
    intervals), not_significant (list of text, pairs of methods with p (Holm) of at least LEVEL), num_pairs (tested).
    """
    rows = []
    for title, cells in summary.groupby("panel", sort=False):
        best = cells.loc[cells["mean"].idxmax()]
        accuracy, n = min(float(best["mean"]), 1.0), int(best["n"])
        tested = comparisons[(comparisons["panel"] == title) & comparisons["p_holm"].notna()]
        pairs = tested.groupby(["parameters", "model", "first", "second"], sort=False)["p_holm"]
        p_values = pairs.agg(["min", "max"])
        means = cells.set_index(["parameters", "model", "method"])["mean"]
        not_significant = [
            _in_words(means, pair, low, high)
            for pair, (low, high) in zip(p_values.index, p_values.to_numpy(), strict=True)
            if high >= LEVEL
        ]
        widths = half_width(accuracy, n), half_width(0.5, n)
        rows.append((title, n, accuracy, *widths, not_significant, len(p_values)))
    names = ["panel", "n", "accuracy", "half_width", "worst_half_width", "not_significant", "num_pairs"]
    return pd.DataFrame(rows, columns=names)


def significance_text(row: dict[str, Any]) -> str:
    """Return the half-widths of one row of significance() as a sentence."""
    return (
        f"{row['panel']}: with {row['n']} problems {format.percent(row['accuracy'], 0)} means ± "
        f"{100 * row['half_width']:.1f} points at 95 % (± {100 * row['worst_half_width']:.1f} at 50 %)."
    )


def _in_words(means: pd.Series, pair: tuple[int, str, str, str], low: float, high: float) -> str:
    size, model, first, second = pair
    difference = f"{100 * abs(means[size, model, first] - means[size, model, second]):.1f} points"
    texts = [format.p_value(low), format.p_value(high)]
    p = texts[0] if texts[0] == texts[1] else " to ".join(texts)
    return f"{model}, {label(first)} and {label(second)}: {difference}, p (Holm) {p}"
