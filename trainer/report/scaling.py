"""How accuracy grows with size: a logistic curve over log parameters, with a bootstrap over the problems.

accuracy = 1 / (1 + exp(-(a + b * log10(parameters)))), fitted by maximum likelihood to the mean number of right
answers over seeds at each size. It stays between 0 and 1, as a power law of the accuracy would not; for small
accuracies it is one: accuracy grows as parameters ** (b / ln 10). Compared with scipy's optimiser in
tests/report/test_scaling.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.report.analysis import Analyses, Answer
from trainer.report.comparisons import difference
from trainer.report.metrics import Floats
from trainer.report.summary import Cell, Panel

MIN_SIZES = 3  # a curve of two parameters goes through any two points
NUM_RESAMPLES = 1000
SEED = 0  # of the resampling
_MAX_ITERATIONS = 100
_MAX_LOG_ODDS = 30.0
_NUM_POINTS = 60  # of the drawn curve


@dataclass(frozen=True)
class Fit:
    """The curve of one method on one panel; `refusal` says why there is none, else it is "".

    Intervals are 95 % percentile intervals over resamples of the problems: the same resample for every size and
    seed, for they answered the same problems. Sizes and seeds are not resampled.
    """

    panel: str
    method: str
    sizes: tuple[int, ...]
    refusal: str = ""
    n: int = 0
    num_seeds: int = 0
    slope: float = 0.0  # log-odds for ten times the parameters
    slope_low: float = 0.0
    slope_high: float = 0.0
    half_at: float | None = (
        None  # parameters at which half of the problems would be solved; None: slope not positive
    )
    largest_residual: float = 0.0  # between curve and mean, as a fraction
    accuracies: tuple[float, ...] = ()  # means over seeds, at `sizes`
    curve: tuple[tuple[float, float, float, float], ...] = ()  # parameters, accuracy, low, high


def fit_panels(panels: Sequence[Panel], analyses: Analyses) -> list[Fit]:
    """A fit, or why there is none, for each panel and method."""
    return [_fit(panel, method, analyses) for panel in panels for method in panel.methods]


def fit_logistic(x: Floats, successes: Floats, n: int) -> tuple[Floats, Floats]:
    """Maximum-likelihood a and b of successes ~ Binomial(n, 1 / (1 + exp(-(a + b x)))), by Newton's method.

    x: (S,) float64. successes: (..., S), between 0 and n, fractions allowed (means over seeds). Returns a and b of
    shape (...,). Where the data are separable (0 % below some size, 100 % above) there is no maximum: steps end at
    log-odds of 30, far beyond what any count tells from certainty.
    """
    centre, spread = x.mean(), x.std()
    z = (x - centre) / spread
    share = np.clip(successes.mean(axis=-1) / n, 0.5 / n, 1 - 0.5 / n)
    a, b = np.log(share / (1 - share)), np.zeros_like(share)
    for _ in range(_MAX_ITERATIONS):
        p = 1 / (1 + np.exp(-np.clip(a[..., None] + b[..., None] * z, -_MAX_LOG_ODDS, _MAX_LOG_ODDS)))
        weight = n * p * (1 - p)
        residual = successes - n * p
        g0, g1 = residual.sum(-1), (residual * z).sum(-1)
        # A ridge of 1e-12 keeps the system solvable where every p is 0 or 1.
        h00, h01, h11 = weight.sum(-1) + 1e-12, (weight * z).sum(-1), (weight * z * z).sum(-1) + 1e-12
        determinant = h00 * h11 - h01 * h01
        step_a = np.clip((h11 * g0 - h01 * g1) / determinant, -2, 2)
        step_b = np.clip((h00 * g1 - h01 * g0) / determinant, -2, 2)
        a, b = (
            np.clip(a + step_a, -_MAX_LOG_ODDS, _MAX_LOG_ODDS),
            np.clip(b + step_b, -_MAX_LOG_ODDS, _MAX_LOG_ODDS),
        )
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < 1e-12:
            break
    return a - b * centre / spread, b / spread


def _fit(panel: Panel, method: str, analyses: Analyses) -> Fit:
    cells = panel.of_method(method)
    sizes = tuple(sorted({cell.num_parameters for cell in cells}))
    if len(sizes) < MIN_SIZES:
        return Fit(panel.title, method, sizes, f"{len(sizes)} of at least {MIN_SIZES} sizes")
    answers = [analyses[e.directory.path].answers for cell in cells for e in cell.evaluations]
    refusal = next((text for other in answers if (text := difference(answers[0], other))), "")
    if refusal:
        return Fit(panel.title, method, sizes, refusal)
    correct = _correct(cells, sizes, analyses)
    n = correct.shape[1]
    means = correct.mean(axis=1)
    if means.max() == 0 or means.min() == 1:
        return Fit(
            panel.title, method, sizes, "all answers are " + ("right" if means.min() == 1 else "wrong")
        )
    x = np.log10(np.array(sizes, dtype=np.float64))
    a, b = fit_logistic(x, means * n, n)
    resampled = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES)
    all_a, all_b = fit_logistic(x, resampled @ correct.T, n)
    low, high = np.quantile(all_b, [0.025, 0.975])
    margin = 0.04 * (x[-1] - x[0])
    points = np.linspace(x[0] - margin, x[-1] + margin, _NUM_POINTS)
    band = np.quantile(_curve(all_a[:, None], all_b[:, None], points), [0.025, 0.975], axis=0)
    rows = np.stack([10**points, _curve(a, b, points), *band], axis=1)
    return Fit(
        panel.title,
        method,
        sizes,
        n=n,
        num_seeds=max(len(cell.evaluations) for cell in cells),
        slope=float(b),
        slope_low=float(low),
        slope_high=float(high),
        half_at=float(10 ** (-a / b)) if b > 0 and abs(a / b) < 300 else None,
        largest_residual=float(np.abs(_curve(a, b, x) - means).max()),
        accuracies=tuple(float(mean) for mean in means),
        curve=tuple(tuple(float(value) for value in row) for row in rows),  # type: ignore[misc]
    )


def _curve(a: Floats | float, b: Floats | float, x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(a + b * x, -_MAX_LOG_ODDS, _MAX_LOG_ODDS))))


def _correct(cells: Sequence[Cell], sizes: Sequence[int], analyses: Analyses) -> NDArray[np.float64]:
    """(sizes, problems): the share of the seeds (and of models of one size) that solved each problem."""
    rows = []
    ids: list[str] = []
    for size in sizes:
        found: list[dict[str, Answer]] = []
        for cell in cells:
            if cell.num_parameters == size:
                found += [
                    answers for e in cell.evaluations if (answers := analyses[e.directory.path].answers)
                ]
        ids = ids or sorted(found[0])
        rows.append(np.mean([[answers[name].correct for name in ids] for answers in found], axis=0))
    return np.array(rows, dtype=np.float64)
