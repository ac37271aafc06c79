"""Intervals and tests for accuracies, exact where that is possible, in pure Python.

Every function is compared with scipy.stats in tests/report/test_statistics.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist


def wilson_interval(correct: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927, JASA 22:209), as two fractions in [0, 1].

    Unlike the normal approximation it keeps its coverage for few problems and near 0 and 1. `correct` may be a
    fraction: the mean count of several seeds on the same n problems. With n = 0 nothing is known: (0, 1).
    """
    if not 0 <= correct <= n:
        raise ValueError(f"correct = {correct} is not between 0 and n = {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence} is not between 0 and 1")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    proportion = correct / n
    denominator = 1 + z * z / n
    centre = (proportion + z * z / (2 * n)) / denominator
    half_width = z / denominator * math.sqrt(proportion * (1 - proportion) / n + z * z / (4 * n * n))
    # Rounding must not leave 1e-17 where the interval touches an end.
    low = 0.0 if correct == 0 else max(0.0, centre - half_width)
    high = 1.0 if correct == n else min(1.0, centre + half_width)
    return low, high


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided McNemar test: the p-value that two methods are equally good on the same problems.

    b and c count the problems that only the first and only the second method solved; under the null hypothesis
    b is binomial(b + c, 1/2). Computed in integers, so it is exact up to the last division.
    """
    if b < 0 or c < 0:
        raise ValueError(f"counts cannot be negative: b = {b}, c = {c}")
    n = b + c
    term, tail = 1, 0  # term = n choose k
    for k in range(min(b, c) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given: they bound the chance of any false alarm in the family."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the standard error of the mean (sample deviation / sqrt(n)); None for a single value."""
    if not values:
        raise ValueError("no values")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
