from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from trainer.report.statistics import holm, mcnemar, mean_and_standard_error, wilson_interval


@pytest.mark.parametrize(
    ("correct", "n"), [(0, 1), (1, 1), (0, 300), (300, 300), (201, 300), (7, 1319), (1, 10**6)]
)
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_wilson_is_scipys(correct: int, n: int, confidence: float) -> None:
    expected = stats.binomtest(correct, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(correct, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_at_the_ends() -> None:
    assert wilson_interval(0, 50)[0] == 0.0 and wilson_interval(50, 50)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(149.5, 300)  # the mean of two seeds
    assert wilson_interval(149, 300)[0] < low < high < wilson_interval(150, 300)[1]


@pytest.mark.parametrize(("correct", "n"), [(-1, 3), (4, 3), (math.nan, 3), (1, -1)])
def test_wilson_refuses_impossible_counts(correct: float, n: int) -> None:
    with pytest.raises(ValueError, match="between"):
        wilson_interval(correct, n)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    for b, c in itertools.product([0, 1, 2, 3, 10, 34, 57, 162], repeat=2):
        expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
        assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)
    assert 0 < mcnemar(0, 1000) < 1e-300


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_mean_and_standard_error() -> None:
    values = [0.61, 0.64, 0.7]
    mean, error = mean_and_standard_error(values)
    assert mean == pytest.approx(np.mean(values)) and error == pytest.approx(stats.sem(values))
    assert mean_and_standard_error([0.5]) == (0.5, None)
