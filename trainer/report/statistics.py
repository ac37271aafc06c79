"""Intervals, tests and means over seeds, from scipy and statsmodels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from statsmodels.stats.contingency_tables import mcnemar as contingency_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Floats = NDArray[np.float64]


def wilson_interval(correct: ArrayLike, n: ArrayLike) -> tuple[Floats, Floats]:
    """Return the lower and upper ends of 95 % Wilson score intervals, as fractions in [0, 1].

    `correct` may be fractional (a mean over seeds) and must lie between 0 and `n`. NaN gives NaN.
    """
    correct, n = np.asarray(correct, dtype=np.float64), np.asarray(n, dtype=np.float64)
    low, high = proportion_confint(correct, n, alpha=0.05, method="wilson")
    # Rounding errors would leave 1e-17 instead of the ends 0 and 1.
    return np.where(correct == 0, 0.0, low), np.where(correct == n, 1.0, high)


def half_width(accuracy: float, n: int) -> float:
    """Return half the width of the 95 % Wilson interval of an accuracy on n problems."""
    low, high = wilson_interval(accuracy * n, n)
    return float(high - low) / 2


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value of the hypothesis that two methods are equally good on the same problems.

    `only_first` and `only_second`: numbers of problems that only this method solved.
    """
    return float(contingency_mcnemar([[0, only_first], [only_second, 0]], exact=True).pvalue)


def holm(p_values: Sequence[float] | pd.Series) -> Floats:
    """Return Holm's adjusted p-values in the order given. NaN (not tested) is not counted and stays NaN."""
    adjusted = np.array(p_values, dtype=np.float64)
    tested = ~np.isnan(adjusted)
    if tested.any():
        adjusted[tested] = multipletests(adjusted[tested], method="holm")[1]
    return adjusted


def estimates(scores: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Return the accuracy over seeds of each group, in the order of first appearance.

    `scores` has a row per seed with `correct` and `n`. Columns added to `by`: mean, low, high (95 % Wilson interval),
    standard_error (of the mean between seeds, NaN for one seed), n, num_seeds, accuracies (list, one per seed).
    Seeds answer the same problems, so n is not multiplied by the number of seeds: the interval is that of one model
    with the mean accuracy. If n differs between seeds, the smallest counts.
    """
    grouped = scores.assign(accuracy=scores["correct"] / scores["n"]).groupby(by, sort=False)
    found = grouped.agg(
        mean=("accuracy", "mean"),
        standard_error=("accuracy", "sem"),
        n=("n", "min"),
        num_seeds=("n", "size"),
        accuracies=("accuracy", list),
    )
    low, high = wilson_interval(np.clip(found["mean"] * found["n"], 0, found["n"]), found["n"])
    found.insert(1, "low", low)
    found.insert(2, "high", high)
    return found.astype({"n": "int64"}).reset_index()
