"""Summaries of a study: accuracies over seeds, error types, quality of sub-questions, uncertainty, headlines."""

import itertools
from typing import Any

import pandas as pd

from trainer.report import format
from trainer.report.error_types import ERROR_TYPES, RIGHT
from trainer.report.methods import label
from trainer.report.statistics import estimates, half_width, wilson_interval

# A cell: the evaluations with the same panel, model and method. Their seeds differ.
CELL_KEYS = ["panel", "model", "parameters", "method"]
# The column `seed` is train_seed of columns.RUNS.
EVALUATION_KEYS = ["panel", "model", "parameters", "total_parameters", "method", "seed"]
SIGNIFICANCE_LEVEL = 0.05
_MANY_PROBLEMS = 1000  # with at least this many problems, headlines show one decimal
_MAX_NAMED = 3  # maximum number of pairs of overlapping intervals that a headline names


def summarise(evaluations: pd.DataFrame) -> pd.DataFrame:
    """Return one row per cell with the mean strict accuracy over its seeds, ordered by panel, size, model and method.

    Columns: CELL_KEYS, total_parameters (see columns.RUNS), and the columns of statistics.estimates.
    """
    cells = estimates(evaluations.rename(columns={"strict_correct": "correct"}), CELL_KEYS)
    largest = evaluations.groupby(CELL_KEYS, sort=False)["total_parameters"].max()
    cells.insert(3, "total_parameters", largest.to_numpy())
    return cells


def summarise_by_num_steps(evaluations: pd.DataFrame) -> pd.DataFrame:
    """Return one row per cell and number of gold steps (num_steps, at least 1) with the mean strict accuracy over the seeds."""
    rows = [
        (*cell, num, correct, n)
        for *cell, by_num_steps in evaluations[[*CELL_KEYS, "by_num_steps"]].itertuples(index=False)
        for num, (correct, n) in by_num_steps.items()
        if num > 0 and n
    ]
    scores = pd.DataFrame(rows, columns=[*CELL_KEYS, "num_steps", "correct", "n"])
    scores["cell"] = scores.groupby(CELL_KEYS, sort=False).ngroup()
    return estimates(scores.sort_values(["cell", "num_steps"], kind="stable"), [*CELL_KEYS, "num_steps"])


def count_error_types(evaluations: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Return one row per evaluation that has gold steps: EVALUATION_KEYS, counts of RIGHT and ERROR_TYPES, n (sum of counts)."""
    counts = predictions.groupby(["evaluation", "error_type"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=[RIGHT, *ERROR_TYPES], fill_value=0)
    keys = evaluations.assign(seed=evaluations["train_seed"])[EVALUATION_KEYS]
    return keys.join(counts.assign(n=counts.sum(axis=1)), how="inner")


def question_quality(evaluations: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """Return one row per evaluation whose models write sub-questions.

    Columns: EVALUATION_KEYS; asking_model, the model that writes the sub-questions; the keys of subquestions.score_questions;
    right_number_share, the fraction right_number / n; low and high, the 95 % Wilson interval of this fraction.
    """
    if quality.empty:
        return quality
    asking = [
        next((member["model_name"] for member in row.members if member["role"] == "decomposer"), row.model)
        for row in evaluations.itertuples()
    ]
    rows = evaluations.assign(seed=evaluations["train_seed"], asking_model=asking)
    rows = rows[[*EVALUATION_KEYS, "asking_model"]].join(quality.set_index("evaluation"), how="inner")
    low, high = wilson_interval(rows["right_number"], rows["n"])
    return rows.assign(right_number_share=rows["right_number"] / rows["n"], low=low, high=high)


def headline_parts(panel: pd.DataFrame) -> dict[str, Any]:
    """Return a panel's headline as a dict with the keys lead, findings, tail and verdict.

    lead, tail and verdict are texts. findings is a list of (method, accuracy, interval) for one model of the panel: the
    largest model that has results for several methods, or the largest model if there is no such model. `panel`: rows of
    summarise().
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
    """Return the result of headline_parts() as one line."""
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


def uncertainty(summary: pd.DataFrame, comparisons: pd.DataFrame) -> pd.DataFrame:
    """Return a row per panel: the uncertainty of the best accuracy, and the differences that are not significant.

    Columns: panel; n and accuracy of the best cell; half_width, half the width of the 95 % Wilson interval of this
    accuracy, as a fraction; worst_half_width, the half-width for an accuracy of 50 %; not_significant, a list with a text
    for each pair of methods whose p-value (Holm; the largest over the seeds) is at least SIGNIFICANCE_LEVEL; num_pairs,
    the number of tested pairs.
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
            _describe_pair(means, pair, low, high)
            for pair, (low, high) in zip(p_values.index, p_values.to_numpy(), strict=True)
            if high >= SIGNIFICANCE_LEVEL
        ]
        widths = half_width(accuracy, n), half_width(0.5, n)
        rows.append((title, n, accuracy, *widths, not_significant, len(p_values)))
    names = ["panel", "n", "accuracy", "half_width", "worst_half_width", "not_significant", "num_pairs"]
    return pd.DataFrame(rows, columns=names)


def uncertainty_text(row: dict[str, Any]) -> str:
    """Return a sentence with the half-widths of one row of uncertainty()."""
    return (
        f"{row['panel']}: with {row['n']} problems {format.percent(row['accuracy'], 0)} means ± "
        f"{100 * row['half_width']:.1f} points at 95 % (± {100 * row['worst_half_width']:.1f} at 50 %)."
    )


def _describe_pair(means: pd.Series, pair: tuple[int, str, str, str], low: float, high: float) -> str:
    size, model, first, second = pair
    difference = f"{100 * abs(means[size, model, first] - means[size, model, second]):.1f} points"
    texts = [format.p_value(low), format.p_value(high)]
    p = texts[0] if texts[0] == texts[1] else " to ".join(texts)
    return f"{model}, {label(first)} and {label(second)}: {difference}, p (Holm) {p}"
