"""Exact McNemar tests of evaluations on the same problems. Holm's method adjusts all p-values of a table together."""

import pandas as pd

from trainer.report.statistics import holm, mcnemar
from trainer.report.summary import CELL_KEYS

_COUNTS = ["both", "only_first", "only_second", "neither"]
_TEST = ["n", *_COUNTS, "p", "p_holm", "refusal"]
# Index of an evaluation in the frame of evaluations -> frame with the index `id` and the columns `problem` (digest of
# question and gold answer) and `correct`.
PredictionsByEvaluation = dict[int, pd.DataFrame]


def predictions_by_evaluation(predictions: pd.DataFrame) -> PredictionsByEvaluation:
    """Return the problem digests and the correctness of the answers, for each evaluation that has predictions."""
    columns = predictions[["evaluation", "id", "problem", "correct"]]
    return {int(number): rows.set_index("id") for number, rows in columns.groupby("evaluation")}


def compare_methods(evaluations: pd.DataFrame, answers: PredictionsByEvaluation) -> pd.DataFrame:
    """Compare evaluations of two methods that have the same panel, model, training seed and sampling seed.

    Return one row per pair of evaluations. Columns: panel, model, parameters, seed; first and second, the two methods; n,
    the number of problems; both, only_first, only_second and neither, the numbers of problems that both methods, only one
    method or no method solved; p; p_holm, p adjusted by Holm; refusal, the reason why there is no test, or "" if there is
    a test. A base model has no training seed, so it is compared with models of every seed.
    """
    rows = evaluations.assign(
        evaluation=evaluations.index, cell=evaluations.groupby(CELL_KEYS, sort=False).ngroup()
    )
    pairs = rows.merge(rows, on=["panel", "model", "parameters", "sampling_seed"], suffixes=("", "_second"))
    first_seed, second_seed = pairs["train_seed"], pairs["train_seed_second"]
    same_seed = (first_seed == second_seed).fillna(True).astype(bool)
    pairs = pairs.assign(seed=first_seed.fillna(second_seed))
    pairs = pairs[(pairs["cell"] < pairs["cell_second"]) & same_seed]
    pairs = pairs.sort_values(["cell", "cell_second", "evaluation", "evaluation_second"])
    pairs = pairs.drop(columns="n").rename(columns={"method": "first", "method_second": "second"})
    columns = ["panel", "model", "parameters", "seed", "first", "second", *_TEST]
    return _add_mcnemar_tests(pairs, answers)[columns]


def compare_calculators(evaluations: pd.DataFrame, answers: PredictionsByEvaluation) -> pd.DataFrame:
    """Compare evaluations with the calculator and evaluations without the calculator that are otherwise equal.

    Return one row per pair. The columns are those of compare_methods, but `method` replaces `first` and `second`. The added
    columns `on` and `off` hold the scores with and without the calculator, as dicts with the keys correct, n, accuracy, low
    and high. `only_first` counts the problems solved only with the calculator.
    """
    scores = evaluations[["strict_correct", "n", "strict_accuracy", "strict_low", "strict_high"]]
    scores = scores.set_axis(["correct", "n", "accuracy", "low", "high"], axis=1).astype(object)
    rows = evaluations.assign(evaluation=evaluations.index, score=scores.to_dict("records"))
    # Two evaluations that are equal in these columns can differ only in the use of the calculator.
    same = ["run_path", "method", "mode", "data", "split", "temperature", "sampling_seed", "stopped_at"]
    uses_calculator = rows["calculator"].astype(bool)
    without = rows[~uses_calculator].drop_duplicates(same, keep="last")[[*same, "evaluation", "score"]]
    pairs = rows[uses_calculator].merge(without, on=same, suffixes=("", "_second"))
    pairs = pairs.drop(columns=["n", "seed"])
    pairs = pairs.rename(columns={"train_seed": "seed", "score": "on", "score_second": "off"})
    columns = ["panel", "model", "parameters", "seed", "method", "on", "off", *_TEST]
    return _add_mcnemar_tests(pairs, answers)[columns]


def why_not_comparable(
    first_predictions: pd.DataFrame | None, second_predictions: pd.DataFrame | None
) -> str:
    """Return the reason why two evaluations cannot be compared problem by problem, or "" if they can be compared."""
    if first_predictions is None or second_predictions is None:
        return "predictions missing"
    only_first = len(first_predictions.index.difference(second_predictions.index))
    only_second = len(second_predictions.index.difference(first_predictions.index))
    if only_first or only_second:
        return f"different problems: {only_first} only in the first, {only_second} only in the second"
    in_second = second_predictions["problem"].reindex(first_predictions.index)
    changed = int((first_predictions["problem"] != in_second).sum())
    return f"different problems: {changed} of the same id differ in question or answer" if changed else ""


def _add_mcnemar_tests(pairs: pd.DataFrame, answers: PredictionsByEvaluation) -> pd.DataFrame:
    """Return `pairs` with the added columns `_TEST`. Each row is a test of `evaluation` against `evaluation_second`."""
    numbers = zip(pairs["evaluation"], pairs["evaluation_second"], strict=True)
    rows = [_test(answers.get(first), answers.get(second)) for first, second in numbers]
    tests = pd.DataFrame(rows, columns=["n", *_COUNTS, "p", "refusal"])
    tests = tests.astype({"p": "float64", "refusal": "object"})
    tests["p_holm"] = holm(tests["p"])
    return pd.concat([pairs.reset_index(drop=True), tests], axis=1)


def _test(first: pd.DataFrame | None, second: pd.DataFrame | None) -> list[object]:
    refusal = why_not_comparable(first, second)
    if refusal or first is None or second is None:
        return [0, 0, 0, 0, 0, None, refusal]
    a, b = first["correct"], second["correct"].reindex(first.index)
    counts = [int(solved.sum()) for solved in (a & b, a & ~b, ~a & b, ~a & ~b)]
    return [len(a), *counts, mcnemar(counts[1], counts[2]), ""]
