from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from trainer.evaluation import score
from trainer.report.statistics import estimates, half_width, holm, mcnemar, wilson_interval

COUNTS = [(0, 1), (1, 1), (0, 300), (300, 300), (201, 300), (7, 1319), (1, 10**6)]


@pytest.mark.parametrize(("correct", "n"), COUNTS)
def test_the_interval_of_an_evaluation_is_the_reports_and_scipys(correct: int, n: int) -> None:
    expected = stats.binomtest(correct, n).proportion_ci(method="wilson")
    low, high = wilson_interval(correct, n)
    assert (float(low), float(high)) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert score.wilson_interval(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_at_the_ends_and_between_counts() -> None:
    assert wilson_interval(0, 50)[0] == 0.0 and wilson_interval(50, 50)[1] == 1.0
    assert score.wilson_interval(0, 50)[0] == 0.0 and score.wilson_interval(50, 50)[1] == 1.0
    assert score.wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(149.5, 300)  # the mean of two seeds
    assert wilson_interval(149, 300)[0] < low < high < wilson_interval(150, 300)[1]
    assert np.isnan(wilson_interval([3.0, np.nan], [10.0, np.nan])).tolist() == [[False, True]] * 2


@pytest.mark.parametrize(("correct", "n"), [(-1, 3), (4, 3), (math.nan, 3), (1, -1)])
def test_wilson_refuses_impossible_counts(correct: float, n: int) -> None:
    with pytest.raises(ValueError, match="between"):
        score.wilson_interval(correct, n)  # type: ignore[arg-type]


def test_mcnemar_is_the_exact_binomial_test() -> None:
    for b, c in itertools.product([0, 1, 2, 3, 10, 34, 57, 162], repeat=2):
        expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
        assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(3, 1) == 2 * (1 + 4) / 2**4 and mcnemar(0, 10) == pytest.approx(2 / 2**10)  # by hand
    assert 0 < mcnemar(0, 1000) < 1e-300


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    assert holm([0.02, math.nan, 0.5]) == pytest.approx([0.04, math.nan, 0.5], nan_ok=True)
    assert holm([]).tolist() == []


def test_estimates_are_means_over_seeds_with_the_interval_of_one_model() -> None:
    scores = pd.DataFrame(
        {"method": ["b", "a", "b", "b"], "correct": [61, 5, 64, 70], "n": [100, 10, 100, 100]}
    )
    found = estimates(scores, ["method"])
    assert found["method"].tolist() == ["b", "a"], "in the order of first appearance"
    b, a = found.to_dict("records")
    assert b["mean"] == pytest.approx(0.65) and b["standard_error"] == pytest.approx(
        stats.sem([0.61, 0.64, 0.7])
    )
    assert (b["n"], b["num_seeds"], b["accuracies"]) == (100, 3, [0.61, 0.64, 0.7])
    assert (b["low"], b["high"]) == pytest.approx([float(end) for end in wilson_interval(65, 100)])
    assert math.isnan(a["standard_error"]) and a["num_seeds"] == 1


def test_half_widths_are_those_of_the_published_data_sets() -> None:
    published = [(0.21, 1319, 2.2), (0.21, 300, 4.6), (0.62, 229, 6.2), (0.2, 300, 4.5)]
    for accuracy, n, points in published:
        assert 100 * half_width(accuracy, n) == pytest.approx(points, abs=0.05)
        interval = stats.binomtest(round(accuracy * n), n).proportion_ci(method="wilson")
        assert half_width(round(accuracy * n) / n, n) == pytest.approx((interval.high - interval.low) / 2)
