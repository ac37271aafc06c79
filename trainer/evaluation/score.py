"""Scores of one prediction, and the accuracy of many."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from statistics import NormalDist
from typing import Any

from trainer.problems import answers
from trainer.problems.problem import Problem


def score_prediction(problem: Problem, text: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return one line of predictions.jsonl: the raw text, the answer by each extraction rule, and `fields`.

    `fields`: at least generated_tokens, calculator_results_given and finished.
    """
    kind = answers.answer_type(problem.answer)
    extracted = {rule: answers.extract_answer(text, rule, kind) for rule in answers.RULES}
    return {
        "id": problem.id,
        "question": problem.question,
        "gold": problem.answer,
        "num_steps": len(problem.steps),
        "gold_steps": [asdict(step) for step in problem.steps],
        "text": text,
        **extracted,
        **{
            f"correct_{rule}": answers.answers_match(answer, problem.answer)
            for rule, answer in extracted.items()
        },
        **fields,
    }


def summarise(predictions: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return accuracy by rule, overall and by number of gold steps, and totals of the generated tokens."""
    predictions = list(predictions)
    groups: dict[int, list[dict[str, Any]]] = {}
    for prediction in predictions:
        groups.setdefault(prediction["num_steps"], []).append(prediction)
    return {
        "num_problems": len(predictions),
        "accuracy": _accuracy(predictions),
        "by_num_steps": {str(steps): _accuracy(groups[steps]) for steps in sorted(groups)},
        "unfinished": sum(not prediction["finished"] for prediction in predictions),
        "generated_tokens": sum(prediction["generated_tokens"] for prediction in predictions),
        "calculator_results_given": sum(prediction["calculator_results_given"] for prediction in predictions),
    }


def _accuracy(predictions: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return by rule: correct, n, accuracy and its 95 % Wilson interval."""
    n = len(predictions)
    result = {}
    for rule in answers.RULES:
        correct = sum(prediction[f"correct_{rule}"] for prediction in predictions)
        low, high = wilson_interval(correct, n)
        result[rule] = {
            "correct": correct,
            "n": n,
            "accuracy": correct / n if n else 0.0,
            "low": low,
            "high": high,
        }
    return result


def accuracy_text(accuracy: dict[str, dict[str, Any]]) -> str:
    """Return e.g. `strict 67.0 % (201/300, 95 %: 61.5-72.1), flexible ...`."""
    return ", ".join(
        f"{rule} {100 * s['accuracy']:.1f} % ({s['correct']}/{s['n']}, 95 %: {100 * s['low']:.1f}-{100 * s['high']:.1f})"
        for rule, s in accuracy.items()
    )


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion as two fractions in [0, 1], (0, 1) for n = 0.

    Written out because a compute node has no statsmodels, which the report uses; a test compares the two.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"correct = {correct} is not between 0 and n = {n}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.975)
    proportion, denominator = correct / n, 1 + z * z / n
    centre = (proportion + z * z / (2 * n)) / denominator
    half_width = z / denominator * math.sqrt(proportion * (1 - proportion) / n + z * z / (4 * n * n))
    # Rounding must not leave 1e-17 where the interval touches an end.
    return (0.0 if correct == 0 else centre - half_width), (1.0 if correct == n else centre + half_width)
