"""Fit accuracy as a function of model size: a logistic curve over log10(parameters), with a bootstrap over the problems.

accuracy = 1 / (1 + exp(-(a + b * log10(parameters)))), fitted by maximum likelihood to the numbers of right answers at
each size (means over seeds). Unlike a power law, the curve stays between 0 and 1. For small accuracies the curve is
close to the power law accuracy ~ parameters ** (b / ln 10).
"""

from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit, logit

from trainer.report.methods import method_order
from trainer.report.paired_tests import PredictionsByEvaluation, why_not_comparable
from trainer.report.statistics import Floats

MIN_SIZES = 3  # a curve with two coefficients fits any two points
NUM_RESAMPLES = 1000
SEED = 0  # seed of the resampling
_MAX_ITERATIONS = 100
_MAX_LOG_ODDS = 30.0
_NUM_POINTS = 60  # number of points of the drawn curve
_WITHOUT_FIT: dict[str, Any] = {
    **{"refusal": "", "n": 0, "num_seeds": 0, "slope": 0.0, "slope_low": 0.0, "slope_high": 0.0},
    **{"half_at": None, "largest_residual": 0.0, "accuracies": (), "curve": ()},
}


def fit_curves(evaluations: pd.DataFrame, answers: PredictionsByEvaluation) -> pd.DataFrame:
    """Return a frame with a row per panel and method.

    Columns: panel, method, sizes (numbers of parameters), refusal (reason why there is no curve; "" if there is a curve), n
    (number of problems), num_seeds, slope (increase of the log-odds for ten times the parameters), slope_low, slope_high,
    half_at (size at which half of the problems are solved; None if the slope is not positive or nearly 0), largest_residual
    (largest difference between a mean accuracy and the curve), accuracies (mean accuracy at each size), curve (tuple of drawn
    points; each point has size, accuracy, low and high). All values named low and high bound 95 % percentile intervals from
    resampled problems. Seeds are not resampled.
    """
    rows = []
    for title, panel in evaluations.groupby("panel", sort=False):
        for method in sorted(panel["method"].unique(), key=method_order):
            cells = panel[panel["method"] == method]
            sizes = tuple(int(size) for size in sorted(cells["parameters"].unique()))
            row = {"panel": title, "method": method, "sizes": sizes}
            rows.append(row | _WITHOUT_FIT | _fit(cells, sizes, answers))
    return pd.DataFrame(rows, columns=["panel", "method", "sizes", *_WITHOUT_FIT])


def fit_logistic(x: Floats, successes: Floats, n: int) -> tuple[Floats, Floats]:
    """Return the maximum-likelihood a and b of successes ~ Binomial(n, expit(a + b x)), by Newton's method.

    x: (S,) float64. successes: (..., S), between 0 and n, perhaps not integer (means over seeds). a and b: (...,). The
    leading dimensions are bootstrap resamples, which are fitted at once: 1,000 resamples take 2 ms on one CPU core. With one
    statsmodels GLM per resample, they take 1.7 s, and the slopes differ from ours by at most 3e-14. The likelihood of
    separable data (0 % below a size and 100 % above) has no maximum, so log-odds are limited to [-30, 30].
    """
    centre, spread = x.mean(), x.std()
    z = (x - centre) / spread
    a = logit(np.clip(successes.mean(axis=-1) / n, 0.5 / n, 1 - 0.5 / n))
    b = np.zeros_like(a)
    for _ in range(_MAX_ITERATIONS):
        p = _curve(a[..., None], b[..., None], z)
        weight = n * p * (1 - p)
        residual = successes - n * p
        g0, g1 = residual.sum(-1), (residual * z).sum(-1)
        # A ridge of 1e-12 keeps the system solvable where every p is 0 or 1.
        h00, h01, h11 = weight.sum(-1) + 1e-12, (weight * z).sum(-1), (weight * z * z).sum(-1) + 1e-12
        determinant = h00 * h11 - h01 * h01
        step_a = np.clip((h11 * g0 - h01 * g1) / determinant, -2, 2)
        step_b = np.clip((h00 * g1 - h01 * g0) / determinant, -2, 2)
        a, b = (np.clip(value, -_MAX_LOG_ODDS, _MAX_LOG_ODDS) for value in (a + step_a, b + step_b))
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < 1e-12:
            break
    return a - b * centre / spread, b / spread


def _fit(cells: pd.DataFrame, sizes: tuple[int, ...], answers: PredictionsByEvaluation) -> dict[str, Any]:
    """Return the values of one row of fit_curves: the columns from `n` to `curve`, or only `refusal` if there is no curve."""
    if len(sizes) < MIN_SIZES:
        return {"refusal": f"{len(sizes)} of at least {MIN_SIZES} sizes"}
    by_evaluation = [answers.get(number) for number in cells.index]
    for frame in by_evaluation:
        if refusal := why_not_comparable(by_evaluation[0], frame):
            return {"refusal": refusal}
    solved = pd.concat([frame["correct"] for frame in by_evaluation if frame is not None], axis=1)
    solved.columns = cells["parameters"].astype(int)
    # correct[size, problem]: share of the evaluations of this size (all seeds and models) that solve the problem.
    correct = np.ascontiguousarray(solved.sort_index().astype(np.float64).T.groupby(level=0).mean())
    means, n = correct.mean(axis=1), correct.shape[1]
    if means.max() == 0 or means.min() == 1:
        return {"refusal": f"all answers are {'right' if means.min() == 1 else 'wrong'}"}
    x = np.log10(np.array(sizes, dtype=np.float64))
    a, b = fit_logistic(x, means * n, n)
    resampled = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES)
    all_a, all_b = fit_logistic(x, resampled @ correct.T, n)
    low, high = np.quantile(all_b, [0.025, 0.975])
    margin = 0.04 * (x[-1] - x[0])
    points = np.linspace(x[0] - margin, x[-1] + margin, _NUM_POINTS)
    band = np.quantile(_curve(all_a[:, None], all_b[:, None], points), [0.025, 0.975], axis=0)
    return {
        "n": n,
        "num_seeds": int(cells.groupby(["parameters", "model"]).size().max()),
        **{"slope": float(b), "slope_low": float(low), "slope_high": float(high)},
        "half_at": float(10 ** (-a / b)) if b > 0 and abs(a / b) < 300 else None,
        "largest_residual": float(np.abs(_curve(a, b, x) - means).max()),
        "accuracies": tuple(means.tolist()),
        "curve": tuple(map(tuple, np.stack([10**points, _curve(a, b, points), *band], axis=1).tolist())),
    }


def _curve(a: Floats, b: Floats, x: Floats) -> Floats:
    return expit(np.clip(a + b * x, -_MAX_LOG_ODDS, _MAX_LOG_ODDS))
