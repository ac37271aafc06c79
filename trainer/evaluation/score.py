"""Score predictions and compute their accuracy."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import NormalDist
from typing import Any

from trainer.problems import answers
from trainer.problems.problem import Problem
from trainer.storage.manifest import Accuracy, Generation, Prediction


def score_prediction(problem: Problem, text: str, generation: Generation) -> Prediction:
    """Return the record of a prediction, with the answer in `text` by each extraction rule and the answer's correctness."""
    gold_type = answers.answer_type(problem.answer)
    strict, flexible = (answers.extract_answer(text, rule, gold_type) for rule in ("strict", "flexible"))
    return {
        "id": problem.id,
        "question": problem.question,
        "gold": problem.answer,
        "num_steps": len(problem.steps),
        "gold_steps": [asdict(step) for step in problem.steps],
        "text": text,
        "strict": strict,
        "flexible": flexible,
        "correct_strict": answers.answers_match(strict, problem.answer),
        "correct_flexible": answers.answers_match(flexible, problem.answer),
        **generation,
    }


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return the accuracy by extraction rule, for all problems and by number of gold steps, and the token counts."""
    groups: dict[int, list[Prediction]] = {}
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


def _accuracy(predictions: Sequence[Prediction]) -> dict[str, Accuracy]:
    strict = sum(prediction["correct_strict"] for prediction in predictions)
    flexible = sum(prediction["correct_flexible"] for prediction in predictions)
    n, by_rule = len(predictions), {}
    for rule, correct in (("strict", strict), ("flexible", flexible)):
        low, high = wilson_interval(correct, n)
        fraction = correct / n if n else 0.0
        by_rule[rule] = Accuracy(correct=correct, n=n, accuracy=fraction, low=low, high=high)
    return by_rule


def accuracy_text(by_rule: dict[str, Accuracy]) -> str:
    """Return the accuracies as text, e.g. `strict 67.0 % (201/300, 95 %: 61.5-72.1), flexible ...`."""
    return ", ".join(
        f"{rule} {100 * record['accuracy']:.1f} % ({record['correct']}/{record['n']}, "
        f"95 %: {100 * record['low']:.1f}-{100 * record['high']:.1f})"
        for rule, record in by_rule.items()
    )


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion as two fractions in [0, 1]; (0, 1) for n = 0.

    The report computes the same interval with statsmodels, which compute nodes may lack. A test compares both results.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"correct = {correct} is not between 0 and n = {n}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.975)
    proportion, denominator = correct / n, 1 + z * z / n
    centre = (proportion + z * z / (2 * n)) / denominator
    half_width = z / denominator * math.sqrt(proportion * (1 - proportion) / n + z * z / (4 * n * n))
    # For correct = 0 and correct = n, one bound is exactly 0 or 1. Rounding errors would give e.g. 1e-17 instead of 0.
    return (0.0 if correct == 0 else centre - half_width), (1.0 if correct == n else centre + half_width)
