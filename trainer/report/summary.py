"""Summaries of a study: accuracies over seeds, error types, quality of sub-questions, uncertainty, headlines."""

import itertools
import math
from typing import Any

import pandas as pd

from trainer.report import format
from trainer.report.error_types import ERROR_TYPES, RIGHT
from trainer.report.methods import label, method_order
from trainer.report.statistics import estimates, half_width, wilson_interval

# A cell: the evaluations with the same panel, model and method. Their seeds differ.
CELL_KEYS = ["panel", "model", "parameters", "method"]
# The column `seed` is train_seed of columns.RUNS.
EVALUATION_KEYS = ["panel", "model", "parameters", "total_parameters", "method", "seed"]
SIGNIFICANCE_LEVEL = 0.05
_MANY_PROBLEMS = 1000  # with at least this many problems, headlines show one decimal
_MAX_NAMED = 2  # maximum number of pairs of methods that a headline names


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


def compared_pairs(comparisons: pd.DataFrame) -> pd.DataFrame:
    """Return one row per panel, model and pair of methods that was tested, over all seeds.

    Columns: panel, model, parameters, first, second; names, the pair (first, second); difference, accuracy of the second
    minus accuracy of the first, mean over the seeds; p_min and p_max, the smallest and largest p-value (Holm) over them;
    better, the method that is significantly better with every seed (p below SIGNIFICANCE_LEVEL), or "" without one.
    """
    keys = ["panel", "model", "parameters", "first", "second"]
    tested = comparisons[comparisons["p_holm"].notna()]
    difference = (tested["only_second"] - tested["only_first"]) / tested["n"]
    winner = tested["second"].where(difference > 0, tested["first"])
    winner = winner.where(tested["p_holm"] < SIGNIFICANCE_LEVEL, "")
    tested = tested.assign(winner=winner, difference=difference)
    groups = tested.groupby(keys, sort=False)
    pairs = groups.agg(difference=("difference", "mean"), p_min=("p_holm", "min"), p_max=("p_holm", "max"))
    pairs["better"] = groups["winner"].agg(lambda winners: winners.iat[0] if winners.nunique() == 1 else "")
    pairs = pairs.reset_index()
    return pairs.assign(names=list(zip(pairs["first"], pairs["second"], strict=True)))


def best_methods(summary: pd.DataFrame, pairs: pd.DataFrame) -> pd.Series:
    """Return whether each row of summarise() is significantly better than all other methods of its panel and model.

    `pairs`: rows of compared_pairs(). A method that was not compared with every other one is never the best.
    """
    wins = pairs.groupby(["panel", "parameters", "model", "better"]).size()
    cells = ["panel", "parameters", "model"]
    rivals = summary.groupby(cells)["method"].transform("size") - 1
    keys = summary[[*cells, "method"]].itertuples(index=False, name=None)
    return (pd.Series([wins.get(key, 0) for key in keys], summary.index) == rivals) & (rivals > 0)


def headline_parts(panel: pd.DataFrame, pairs: pd.DataFrame) -> dict[str, Any]:
    """Return a panel's headline as a dict with the keys lead, findings, tail and verdict.

    lead, tail and verdict are texts. findings is a list of (method, note, accuracy, interval) for one model of the panel: the
    largest model that has results for several methods, or the largest model if there is no such model. `panel`: rows of
    summarise(). `pairs`: rows of compared_pairs() of the panel.
    """
    models = panel.groupby(["parameters", "model"])["method"].size()
    size, model = (models[models > 1] if (models > 1).any() else models).index[-1]
    cells = panel[(panel["parameters"] == size) & (panel["model"] == model)]
    cells = cells.sort_values("mean", ascending=False, kind="stable")
    digits = 1 if cells["n"].min() >= _MANY_PROBLEMS else 0
    seeds = _range(cells["num_seeds"])
    findings = []
    for cell in cells.itertuples():
        is_pair = cell.total_parameters == 2 * size
        note = (
            f"(two models of {format.count(size)})"
            if is_pair
            else f"({format.count(cell.total_parameters)} in all)"
        )
        numbers = format.percent(cell.mean, digits), format.interval(cell.low, cell.high, digits)
        findings.append((cell.method, note if cell.total_parameters != size else "", *numbers))
    return {
        "lead": f"On {_range(cells['n'])} problems of {panel['panel'].iat[0]}, models of {format.count(size)} parameters:",
        "findings": findings,
        "tail": "One training seed" if seeds == "1" else f"Mean of {seeds} training seeds",
        "verdict": _verdict(pairs[(pairs["parameters"] == size) & (pairs["model"] == model)]),
    }


def headline_text(parts: dict[str, Any]) -> str:
    """Return the result of headline_parts() as one line."""
    findings = ", ".join(" ".join(filter(None, (label(name), *texts))) for name, *texts in parts["findings"])
    return f"{parts['lead']} {findings}. {parts['tail']}. {parts['verdict']}".strip()


def _range(numbers: pd.Series) -> str:
    return " to ".join(map(str, sorted({numbers.min(), numbers.max()})))


def _verdict(pairs: pd.DataFrame) -> str:
    """Return a sentence about the significance of the differences between the methods of one model."""
    weak = pairs[pairs["better"] == ""]
    if pairs.empty or len(weak) in (0, len(pairs)):
        return (
            ""
            if pairs.empty
            else f"{'No difference is' if len(weak) else 'All differences are'} significant."
        )
    unclear = set().union(*weak["names"])
    clear = set().union(*pairs["names"]) - unclear
    if len(clear) == 1 and len(weak) == math.comb(len(unclear), 2):
        return f"{label(*clear)} differs significantly from every other method; the others do not differ significantly."
    if len(weak) > _MAX_NAMED:
        return f"{len(pairs) - len(weak)} of the {len(pairs)} differences are significant."
    named = (f"{label(first)} and {label(second)}" for first, second in weak["names"])
    return f"All differences are significant, except between {', and between '.join(named)}."


def contrasts(panel: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    """Return a sentence per pair of neighbouring methods: at which sizes one is significantly better than the other.

    Methods are in display order, so the neighbours of answer_only, cot, socratic and a pair of models differ by one thing.
    `panel`, `pairs`: as in headline_parts().
    """
    texts = []
    for first, second in itertools.pairwise(sorted(panel["method"].unique(), key=method_order)):
        rows = pairs[(pairs["first"] == first) & (pairs["second"] == second)].sort_values("parameters")
        sizes = {better: list(of.map(format.count)) for better, of in rows.groupby("better")["parameters"]}
        named = {
            better: "every size" if len(of) == len(rows) > 1 else _join(of) for better, of in sizes.items()
        }
        parts = [
            f"{label(better)} is significantly better than {label(other)} at {named[better]}"
            for better, other in ((second, first), (first, second))
            if better in named
        ]
        if "" in named:
            at_no_size = f"{label(second)} and {label(first)} differ significantly at no size"
            parts.append(f"no significant difference at {named['']}" if parts else at_no_size)
        texts += ["; ".join(parts) + "."] if parts else []
    return texts


def _join(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def seed_spread(panel: pd.DataFrame) -> str:
    """Return a sentence about the largest difference between the seeds of a cell. `panel`: rows of summarise()."""
    several = panel[panel["num_seeds"] > 1]
    if several.empty:
        return "Every training has one seed, so the differences between training seeds are unknown."
    spreads = several["accuracies"].map(lambda accuracies: 100 * (max(accuracies) - min(accuracies)))
    widest = several.loc[spreads.idxmax()]
    low, high = (format.percent(extreme(widest["accuracies"]), 0) for extreme in (min, max))
    sizes = _join(list(several["parameters"].drop_duplicates().map(format.count)))
    return (
        f"At {sizes} parameters there are {_range(several['num_seeds'])} training seeds. They differ most for "
        f"{label(widest['method'])}: {low} to {high}."
    )


def uncertainty(summary: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Return a row per panel: the uncertainty of the best accuracy, and the differences that are not significant.

    Columns: panel; n and accuracy of the best cell; half_width, half the width of the 95 % Wilson interval of this
    accuracy, as a fraction; worst_half_width, the half-width for an accuracy of 50 %; not_significant, a list with a text
    for each pair of methods of which none is significantly better with every seed; num_pairs, the number of tested pairs.
    """
    rows = []
    for title, cells in summary.groupby("panel", sort=False):
        best = cells.loc[cells["mean"].idxmax()]
        accuracy, n = min(float(best["mean"]), 1.0), int(best["n"])
        of_panel = pairs[pairs["panel"] == title]
        not_significant = [_describe_pair(pair) for pair in of_panel.itertuples() if not pair.better]
        widths = half_width(accuracy, n), half_width(0.5, n)
        rows.append((title, n, accuracy, *widths, not_significant, len(of_panel)))
    names = ["panel", "n", "accuracy", "half_width", "worst_half_width", "not_significant", "num_pairs"]
    return pd.DataFrame(rows, columns=names)


def uncertainty_text(row: dict[str, Any]) -> str:
    """Return a sentence with the half-widths of one row of uncertainty()."""
    return (
        f"With {row['n']} problems, {format.percent(row['accuracy'], 0)} means ± "
        f"{100 * row['half_width']:.1f} points, and 50 % ± {100 * row['worst_half_width']:.1f} (95 % interval)."
    )


def _describe_pair(pair: Any) -> str:
    difference = f"{100 * abs(pair.difference):.1f} points"
    texts = [format.p_value(pair.p_min), format.p_value(pair.p_max)]
    p = texts[0] if texts[0] == texts[1] else " to ".join(texts)
    return f"{pair.model}, {label(pair.first)} and {label(pair.second)}: {difference}, p (Holm) {p}"
