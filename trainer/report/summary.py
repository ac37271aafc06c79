"""Group evaluations for tables and figures: a panel is one set of problems, a cell one method at one size in it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trainer.report.evaluations import Evaluation, Score
from trainer.report.format import clean
from trainer.report.methods import base, method_rank
from trainer.report.results import Run
from trainer.report.statistics import mean_and_standard_error, wilson_interval


@dataclass(frozen=True)
class Cell:
    """One method with one model on one panel: an evaluation for each seed."""

    method: str
    model_name: str
    num_parameters: int
    evaluations: tuple[Evaluation, ...]

    @property
    def total_parameters(self) -> int:
        """Of all models that answer together."""
        return max(evaluation.total_parameters for evaluation in self.evaluations)

    @property
    def nums_of_steps(self) -> list[int]:
        """Numbers of steps of the problems, ascending; problems whose data has no steps count as 0 and are left out."""
        return sorted({num for evaluation in self.evaluations for num in evaluation.by_num_steps if num > 0})

    def scores(self, rule: str = "strict", num_steps: int | None = None) -> list[Score]:
        """One score a seed; `num_steps` picks the problems whose gold solution has so many steps."""
        if num_steps is None:
            return [evaluation.accuracy[rule] for evaluation in self.evaluations]
        by_steps = (evaluation.by_num_steps.get(num_steps) for evaluation in self.evaluations)
        return [scores[rule] for scores in by_steps if scores is not None and scores[rule].n]

    @cached_property
    def estimate(self) -> Estimate:
        return estimate(self.scores())


@dataclass(frozen=True)
class Estimate:
    """Accuracy over seeds: the mean, its 95 % interval, and the standard error between seeds (None for one seed)."""

    mean: float
    low: float
    high: float
    standard_error: float | None
    n: int  # problems, not problems times seeds
    num_seeds: int

    def overlaps(self, other: Estimate) -> bool:
        return self.low <= other.high and other.low <= self.high


def estimate(scores: Sequence[Score]) -> Estimate:
    """Mean accuracy over seeds with the Wilson interval of that mean on n problems.

    Seeds answer the same problems, so they are not new problems: n is not multiplied by the number of seeds, and
    the interval is that of one student of mean accuracy. If n differs between seeds, the smallest counts.
    """
    n = min(score.n for score in scores)
    mean, standard_error = mean_and_standard_error([score.accuracy for score in scores])
    # The mean of fractions can be 1e-17 above 1.
    low, high = wilson_interval(min(max(mean * n, 0.0), float(n)), n)
    return Estimate(mean, low, high, standard_error, n, len(scores))


@dataclass(frozen=True)
class Panel:
    """Evaluations that may be compared: the same problems, asked in the same way."""

    title: str
    cells: tuple[Cell, ...]  # by size, then method
    plain: bool = (
        True  # the data as published: greedy, with the calculator, by finished students trained on it
    )

    @property
    def data(self) -> str:
        return self.cells[0].evaluations[0].data

    @property
    def evaluations(self) -> list[Evaluation]:
        return [evaluation for cell in self.cells for evaluation in cell.evaluations]

    @property
    def methods(self) -> list[str]:
        return sorted({cell.method for cell in self.cells}, key=method_rank)

    @property
    def models(self) -> list[tuple[int, str]]:
        """(num_parameters, model_name), smallest first."""
        return sorted({(cell.num_parameters, cell.model_name) for cell in self.cells})

    def of_method(self, method: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.method == method]

    def of_model(self, model: tuple[int, str]) -> list[Cell]:
        return [cell for cell in self.cells if (cell.num_parameters, cell.model_name) == model]


def panels(runs: Sequence[Run]) -> list[Panel]:
    """All evaluations of `runs`, grouped. Studies are kept apart only where a run occurs in more than one."""
    several_studies = max(Counter(run.name for run in runs).values()) > 1
    evaluations = [evaluation for run in runs for evaluation in run.evaluations]
    titles = {e.directory.path: (e.study if several_studies else "", *_title_parts(e)) for e in evaluations}
    # The same student asked twice in ways that the title does not tell apart: then the directory's name does.
    same = Counter((titles[e.directory.path], e.run, e.seed) for e in evaluations)
    grouped: dict[tuple[str, ...], dict[tuple[int, str, str], list[Evaluation]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for evaluation in evaluations:
        title = titles[evaluation.directory.path]
        name = (
            clean(evaluation.directory.path.name) if same[title, evaluation.run, evaluation.seed] > 1 else ""
        )
        cell = (evaluation.num_parameters, evaluation.model_name, evaluation.method)
        grouped[(*title, name)][cell].append(evaluation)
    result = []
    # The plain case first: panels with fewer remarks.
    for key, cells in sorted(grouped.items(), key=lambda item: (sum(map(bool, item[0])), item[0])):
        ordered = sorted(cells.items(), key=lambda item: (*item[0][:2], method_rank(item[0][2])))
        members = [
            Cell(method, model, size, tuple(sorted(found, key=lambda e: (e.train_seed or 0, e.run, e.seed))))
            for (size, model, method), found in ordered
        ]
        plain = not any(key[2:])  # beside the study and the problems
        result.append(Panel(" · ".join(part for part in key if part), tuple(members), plain))
    return result


def in_order(runs: Sequence[Run]) -> list[Run]:
    """By study, size, method and seed: the order of every table."""

    def key(run: Run) -> tuple[Any, ...]:
        seed = -1 if run.seed is None else run.seed
        return run.study, run.num_parameters or 0, run.model_name, method_rank(run.method), seed, run.name

    return sorted(runs, key=key)


def _title_parts(evaluation: Evaluation) -> tuple[str, ...]:
    """What makes two accuracies comparable, as words; the usual case of each is not mentioned."""
    return (
        evaluation.problems,
        f"trained on {evaluation.trained_elsewhere}" if evaluation.trained_elsewhere else "",
        f"asked for {evaluation.mode}" if evaluation.mode != base(evaluation.method) else "",
        "" if evaluation.calculator else "no calculator",
        f"temperature {evaluation.temperature:g}" if evaluation.temperature else "",
        "" if evaluation.stopped_at is None else f"stopped at step {evaluation.stopped_at}",
    )
