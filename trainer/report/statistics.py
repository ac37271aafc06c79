"""Intervals, tests and means over seeds, from scipy and statsmodels."""

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
    # Rounding errors would give 1e-17 instead of 0, and a little less than 1 instead of 1.
    return np.where(correct == 0, 0.0, low), np.where(correct == n, 1.0, high)


def half_width(accuracy: float, n: int) -> float:
    """Return half the width of the 95 % Wilson interval of an accuracy on n problems."""
    low, high = wilson_interval(accuracy * n, n)
    return float(high - low) / 2


def mcnemar(only_first: int, only_second: int) -> float:
    """Return McNemar's exact two-sided p-value from the numbers of problems that only one of two methods solved."""
    return float(contingency_mcnemar([[0, only_first], [only_second, 0]], exact=True).pvalue)


def holm(p_values: Sequence[float] | pd.Series) -> Floats:
    """Return p-values adjusted by Holm's method, in the same order. A NaN does not count as a test and stays NaN."""
    adjusted = np.array(p_values, dtype=np.float64)
    tested = ~np.isnan(adjusted)
    if tested.any():
        adjusted[tested] = multipletests(adjusted[tested], method="holm")[1]
    return adjusted


def estimates(scores: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Group the rows of `scores` by the columns in `by`. Return one row per group, in the order of first appearance.

    Each row of `scores` is a seed with `correct` right answers to `n` problems. The columns of the result are those in `by`,
    then mean (accuracy), low and high (95 % Wilson interval), standard_error (of the mean; NaN for one seed), n, num_seeds,
    and accuracies (a list with one accuracy per seed). All seeds answer the same problems. Therefore the interval is that of
    a single model with the mean accuracy on n problems. If n differs between seeds, the smallest n is used.
    """
    grouped = scores.assign(accuracy=scores["correct"] / scores["n"]).groupby(by, sort=False)
    mean, n = grouped["accuracy"].mean(), grouped["n"].min().astype("int64")
    low, high = wilson_interval(np.clip(mean * n, 0, n), n)
    columns = {"mean": mean, "low": low, "high": high, "standard_error": grouped["accuracy"].sem(), "n": n}
    columns |= {"num_seeds": grouped.size(), "accuracies": grouped["accuracy"].agg(list)}
    return pd.DataFrame(columns).reset_index()
