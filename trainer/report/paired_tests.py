"""Exact McNemar tests of evaluations on the same problems, adjusted by Holm over each table."""

from __future__ import annotations

import pandas as pd

from trainer.report.statistics import holm, mcnemar
from trainer.report.summary import CELL

_COUNTS = ["both", "only_first", "only_second", "neither"]
_TEST = ["n", *_COUNTS, "p", "p_holm", "refusal"]
Answers = dict[int, pd.DataFrame]  # evaluation -> columns problem and correct, by id


def answers_by_evaluation(predictions: pd.DataFrame) -> Answers:
    """Return problem digests and correctness of each evaluation that has predictions."""
    columns = predictions[["evaluation", "id", "problem", "correct"]]
    return {int(number): rows.set_index("id") for number, rows in columns.groupby("evaluation")}


def compare_methods(evaluations: pd.DataFrame, answers: Answers) -> pd.DataFrame:
    """Return a row per pair of methods that share panel, model and training seed.

    Columns: panel, model, parameters, seed, first, second (methods), n, both, only_first, only_second,
    neither (problems solved), p, p_holm, refusal (the reason why the pair is not tested, else ""). A base
    model has no training seed and is compared with every seed of the others.
    """
    rows = evaluations.assign(
        evaluation=evaluations.index, cell=evaluations.groupby(CELL, sort=False).ngroup()
    )
    pairs = rows.merge(rows, on=["panel", "model", "parameters", "sampling_seed"], suffixes=("", "_second"))
    first_seed, second_seed = pairs["train_seed"], pairs["train_seed_second"]
    same_seed = (first_seed == second_seed).fillna(True).astype(bool)
    pairs = pairs.assign(seed=first_seed.fillna(second_seed))
    pairs = pairs[(pairs["cell"] < pairs["cell_second"]) & same_seed]
    pairs = pairs.sort_values(["cell", "cell_second", "evaluation", "evaluation_second"])
    pairs = pairs.drop(columns="n").rename(columns={"method": "first", "method_second": "second"})
    return _tested(pairs, answers)[["panel", "model", "parameters", "seed", "first", "second", *_TEST]]


def compare_calculators(evaluations: pd.DataFrame, answers: Answers) -> pd.DataFrame:
    """Return a row per model and method evaluated on the same problems with and without the calculator.

    Columns as of compare_methods, with method instead of first and second, and on and off: dicts of correct, n,
    accuracy, low, high. `only_first`: solved with the calculator alone.
    """
    scores = evaluations[["strict_correct", "n", "strict_accuracy", "strict_low", "strict_high"]]
    scores = scores.set_axis(["correct", "n", "accuracy", "low", "high"], axis=1).astype(object)
    rows = evaluations.assign(evaluation=evaluations.index, score=scores.to_dict("records"))
    # Columns that must be equal for two evaluations to differ in the calculator alone.
    same = ["run_path", "method", "mode", "data", "split", "temperature", "sampling_seed", "stopped_at"]
    uses_calculator = rows["calculator"].astype(bool)
    without = rows[~uses_calculator].drop_duplicates(same, keep="last")[[*same, "evaluation", "score"]]
    pairs = rows[uses_calculator].merge(without, on=same, suffixes=("", "_second"))
    pairs = pairs.drop(columns=["n", "seed"])
    pairs = pairs.rename(columns={"train_seed": "seed", "score": "on", "score_second": "off"})
    return _tested(pairs, answers)[["panel", "model", "parameters", "seed", "method", "on", "off", *_TEST]]


def why_not_comparable(first: pd.DataFrame | None, second: pd.DataFrame | None) -> str:
    """Return the reason why two evaluations are not of the same problems, "" if they are."""
    if first is None or second is None:
        return "predictions missing"
    missing = len(first.index.difference(second.index)), len(second.index.difference(first.index))
    if any(missing):
        return f"different problems: {missing[0]} only in the first, {missing[1]} only in the second"
    changed = int((first["problem"] != second["problem"].reindex(first.index)).sum())
    return f"different problems: {changed} of the same id differ in question or answer" if changed else ""


def _tested(pairs: pd.DataFrame, answers: Answers) -> pd.DataFrame:
    """Return `pairs` with the test of the columns evaluation and evaluation_second added."""
    tests = pd.DataFrame(
        [
            _test(answers.get(first), answers.get(second))
            for first, second in zip(pairs["evaluation"], pairs["evaluation_second"], strict=True)
        ],
        columns=["n", *_COUNTS, "p", "refusal"],
    ).astype({"p": "float64", "refusal": "object"})
    tests["p_holm"] = holm(tests["p"])
    return pd.concat([pairs.reset_index(drop=True), tests], axis=1)


def _test(first: pd.DataFrame | None, second: pd.DataFrame | None) -> list[object]:
    refusal = why_not_comparable(first, second)
    if refusal or first is None or second is None:
        return [0, 0, 0, 0, 0, None, refusal]
    a, b = first["correct"], second["correct"].reindex(first.index)
    counts = [int(found.sum()) for found in (a & b, a & ~b, ~a & b, ~a & ~b)]
    return [len(a), *counts, mcnemar(counts[1], counts[2]), ""]
