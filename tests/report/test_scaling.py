from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import optimize

from trainer.report.columns import to_dicts
from trainer.report.error_types import analyse
from trainer.report.load import load_frames
from trainer.report.paired_tests import predictions_by_evaluation
from trainer.report.scaling import fit_curves, fit_logistic
from trainer.storage.run_directory import StudyDirectory

X = np.log10([124e6, 355e6, 774e6, 1.5e9])


@pytest.mark.parametrize(
    "successes",
    [[19, 94, 170, 278], [0, 1, 0, 3], [300, 299, 300, 297], [150, 150, 150, 150], [60.5, 31, 12.25, 4]],
)
def test_the_fit_is_the_maximum_that_scipy_finds(successes: list[float]) -> None:
    n = 300

    def loss(parameters: np.ndarray) -> float:
        z = parameters[0] + parameters[1] * (X - X.mean())
        # log(1 + exp(z)), without overflow
        return float(np.sum(n * np.logaddexp(0, z) - np.array(successes) * z))

    found = optimize.minimize(
        loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-12}
    )
    a, b = fit_logistic(X, np.array(successes, dtype=np.float64), n)
    assert [a + b * X.mean(), b] == pytest.approx(found.x, abs=1e-5)


def test_many_fits_at_once_are_the_single_ones() -> None:
    counts = np.random.default_rng(3).integers(0, 301, size=(50, 4)).astype(np.float64)
    a, b = fit_logistic(X, counts, 300)
    for index, row in enumerate(counts):
        assert (a[index], b[index]) == pytest.approx([float(v) for v in fit_logistic(X, row, 300)], abs=1e-9)


def test_separable_data_end_in_finite_numbers() -> None:
    a, b = fit_logistic(X, np.array([[0.0, 0, 300, 300], [0, 0, 0, 0], [300, 300, 300, 300]]), 300)
    assert np.isfinite(a).all() and np.isfinite(b).all() and b[0] > 10


def test_the_bootstrap_interval_is_the_asymptotic_one(whole_study: StudyDirectory) -> None:
    """One seed: problems are resampled together at all sizes, so the interval includes the covariance between sizes."""
    evaluations = load_frames([whole_study.path]).evaluations
    answers = predictions_by_evaluation(analyse(evaluations)[0])
    fits = {(fit["panel"], fit["method"]): fit for fit in to_dicts(fit_curves(evaluations, answers))}
    fit = fits["gsm8k test", "cot"]
    assert not fit["refusal"] and fit["n"] == 60
    assert fit["slope_low"] < fit["slope"] < fit["slope_high"]
    cells = evaluations[(evaluations["panel"] == "gsm8k test") & (evaluations["method"] == "cot")]
    ids = answers[cells.index[0]].index
    correct = np.array([answers[number]["correct"].reindex(ids) for number in cells.index], dtype=float)
    assert fit["accuracies"] == pytest.approx(correct.mean(axis=1))
    x = np.log10(fit["sizes"])
    a, b = fit_logistic(x, correct.sum(axis=1), 60)
    assert b == pytest.approx(fit["slope"])
    # Delta method: slope = sum of its influence over problems.
    p = 1 / (1 + np.exp(-(a + b * x)))
    design = np.stack([np.ones_like(x), x])
    information = 60 * (design * p * (1 - p)) @ design.T
    influence = np.linalg.solve(information, design @ (correct - p[:, None]))[1]
    error = np.sqrt(np.sum((influence - influence.mean()) ** 2))
    assert fit["slope_high"] - fit["slope_low"] == pytest.approx(2 * 1.96 * error, rel=0.25)


def test_fits_are_refused_below_three_sizes_and_without_the_same_problems(
    whole_study: StudyDirectory,
) -> None:
    paths = [whole_study.run(f"stories.cot.{m}.s0").path for m in ("gpt2", "gpt2-large")]
    evaluations = load_frames(paths).evaluations
    fits = fit_curves(evaluations, predictions_by_evaluation(analyse(evaluations)[0]))
    assert fits["refusal"].tolist() == ["2 of at least 3 sizes"] * 2


def test_no_curve_if_no_problem_is_solved(whole_report_record: dict) -> None:
    by_method = {(f["panel"], f["method"]): f for f in whole_report_record["fits"]}
    assert len(by_method) == 7 + 2
    for fit in by_method.values():
        assert fit["refusal"] in ("", "all answers are wrong")
        if not fit["refusal"]:
            _, mean, low, high = np.array(fit["curve"]).T
            assert (low <= mean).all() and (mean <= high).all() and fit["half_at"] > 0


@pytest.fixture
def whole_report_record(whole_report) -> dict:
    return json.loads((whole_report / "results.json").read_text())
