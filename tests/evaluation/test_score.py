from __future__ import annotations

from dataclasses import asdict
from typing import Any

from scipy import stats

from trainer.evaluation.score import accuracy_text, score_prediction, summarise
from trainer.problems.problem import Problem, Step

STEPS = (Step("How many?", "1+1 = <<1+1=2>>2"), Step("And then?", "2*9 = <<2*9=18>>18"))


def written(generated_tokens: int, finished: bool) -> dict[str, Any]:
    return {"generated_tokens": generated_tokens, "calculator_results_given": 2, "finished": finished}


def problem(name: str, gold: str = "18", num_steps: int = 2) -> Problem:
    return Problem(name, "How many?", gold, STEPS[:num_steps])


def test_prediction_has_raw_text_and_both_answers() -> None:
    good = score_prediction(problem("a"), "2*9 = 18\n#### $18.00", written(9, True))
    assert (good["strict"], good["correct_strict"], good["correct_flexible"]) == ("$18.00", True, True)
    loose = score_prediction(problem("b"), "so it is 18", written(4, False))
    assert (loose["strict"], loose["flexible"]) == (None, "18")
    assert (loose["correct_strict"], loose["correct_flexible"]) == (False, True)
    assert loose == {
        "id": "b", "question": "How many?", "gold": "18", "num_steps": 2, "text": "so it is 18", "strict": None,
        "flexible": "18", "correct_strict": False, "correct_flexible": True, "generated_tokens": 4, "finished": False,
        "calculator_results_given": 2, "gold_steps": [asdict(step) for step in STEPS[:2]],
    }  # fmt: skip
    yes = score_prediction(problem("c", "yes", 0), "there are 3 of them, so yes", written(5, True))
    assert yes["correct_flexible"] and not yes["correct_strict"]


def test_summary_adds_up() -> None:
    predictions = [
        score_prediction(problem(f"{i}", num_steps=i % 3), "#### 18" if i % 4 else "18", written(10, i != 5))
        for i in range(30)
    ]
    summary = summarise(predictions)
    assert (summary["num_problems"], summary["unfinished"], summary["generated_tokens"]) == (30, 1, 300)
    assert summary["calculator_results_given"] == 60
    assert list(summary["by_num_steps"]) == ["0", "1", "2"]
    for rule, correct in (("strict", 22), ("flexible", 30)):
        total = summary["accuracy"][rule]
        expected = stats.binomtest(correct, 30).proportion_ci(method="wilson")
        assert (total["correct"], total["n"], total["accuracy"]) == (correct, 30, correct / 30)
        assert abs(total["low"] - expected.low) < 1e-12 and abs(total["high"] - expected.high) < 1e-12
        assert sum(group[rule]["correct"] for group in summary["by_num_steps"].values()) == correct
        assert sum(group[rule]["n"] for group in summary["by_num_steps"].values()) == 30
    assert "strict 73.3 % (22/30, 95 %: 55.6-85.8)" in accuracy_text(summary["accuracy"])


def test_summary_without_predictions() -> None:
    assert summarise([])["accuracy"]["strict"] == {
        "correct": 0,
        "n": 0,
        "accuracy": 0.0,
        "low": 0.0,
        "high": 1.0,
    }
