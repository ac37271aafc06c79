"""Students on the same problems, pair by pair: the exact McNemar test over predictions.jsonl."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from trainer.report.analysis import Analyses, Answer
from trainer.report.evaluations import Evaluation, Score
from trainer.report.statistics import holm, mcnemar
from trainer.report.summary import Panel


@dataclass(frozen=True)
class Comparison:
    """Two methods of one size and seed; `refusal` says why they were not compared, else it is ""."""

    panel: str
    model_name: str
    num_parameters: int
    seed: int | None
    first: str  # method
    second: str
    n: int = 0
    both: int = 0
    only_first: int = 0
    only_second: int = 0
    neither: int = 0
    p: float | None = None
    p_holm: float | None = None  # adjusted over every comparison of methods in the report
    refusal: str = ""


@dataclass(frozen=True)
class CalculatorComparison:
    """One student with the calculator and without it."""

    panel: str
    model_name: str
    num_parameters: int
    seed: int | None
    method: str
    on: Score
    off: Score
    n: int = 0
    both: int = 0
    only_first: int = 0  # solved with the calculator alone
    only_second: int = 0
    neither: int = 0
    p: float | None = None
    p_holm: float | None = None  # adjusted over every student compared with itself
    refusal: str = ""


_Tested = TypeVar("_Tested", Comparison, CalculatorComparison)


def compare(panels: Sequence[Panel], analyses: Analyses) -> list[Comparison]:
    """All pairs of methods that share panel, model and training seed, with Holm's adjustment over all of them.

    A base model that was not trained has no seed: it is compared with every seed of the others.
    """
    comparisons = []
    for panel in panels:
        for model in panel.models:
            for first, second in itertools.combinations(panel.of_model(model), 2):
                for a, b in itertools.product(first.evaluations, second.evaluations):
                    if a.seed == b.seed and (
                        a.train_seed == b.train_seed or None in (a.train_seed, b.train_seed)
                    ):
                        seed = b.train_seed if a.train_seed is None else a.train_seed
                        names = (panel.title, a.model_name, a.num_parameters, seed, a.method, b.method)
                        comparisons.append(Comparison(*names, **_compare_two(a, b, analyses)))
    return _adjusted(comparisons)


def compare_calculators(panels: Sequence[Panel], analyses: Analyses) -> list[CalculatorComparison]:
    """Every student that answered the same problems with and without the calculator, in the order of the panels."""
    without = {_student(e): e for panel in panels for e in panel.evaluations if not e.calculator}
    comparisons = []
    for panel in panels:
        for on in panel.evaluations:
            off = without.get(_student(on))
            if on.calculator and off is not None:
                names = (panel.title, on.model_name, on.num_parameters, on.train_seed, on.method)
                scores = (on.accuracy["strict"], off.accuracy["strict"])
                comparisons.append(CalculatorComparison(*names, *scores, **_compare_two(on, off, analyses)))
    return _adjusted(comparisons)


def _student(evaluation: Evaluation) -> tuple[Any, ...]:
    """All that must be equal for two evaluations to differ in the calculator alone."""
    run = (evaluation.directory.path.parent, evaluation.method, evaluation.mode)
    return (
        *run,
        evaluation.data,
        evaluation.split,
        evaluation.temperature,
        evaluation.seed,
        evaluation.stopped_at,
    )


def _adjusted(comparisons: list[_Tested]) -> list[_Tested]:
    adjusted = iter(holm([p for p in (comparison.p for comparison in comparisons) if p is not None]))
    return [c if c.p is None else replace(c, p_holm=next(adjusted)) for c in comparisons]


def _compare_two(a: Evaluation, b: Evaluation, analyses: Analyses) -> dict[str, Any]:
    """The fields of a comparison from n on."""
    first, second = analyses[a.directory.path].answers, analyses[b.directory.path].answers
    refusal = difference(first, second)
    if refusal:
        return {"refusal": refusal}
    assert first is not None and second is not None
    table = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for name, answer in first.items():
        table[answer.correct, second[name].correct] += 1
    b_only, c_only = table[True, False], table[False, True]
    counts = {
        "both": table[True, True],
        "only_first": b_only,
        "only_second": c_only,
        "neither": table[False, False],
    }
    return {"n": len(first), **counts, "p": mcnemar(b_only, c_only)}


def difference(first: dict[str, Answer] | None, second: dict[str, Answer] | None) -> str:
    """Why two evaluations are not of the same problems, or ""."""
    if first is None or second is None:
        return "predictions missing"
    only_in_first, only_in_second = len(first.keys() - second.keys()), len(second.keys() - first.keys())
    if only_in_first or only_in_second:
        return f"different problems: {only_in_first} only in the first, {only_in_second} only in the second"
    changed = sum(first[name].problem != second[name].problem for name in first)
    return f"different problems: {changed} of the same id differ in question or answer" if changed else ""
