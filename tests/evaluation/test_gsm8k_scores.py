"""Scores on the GSM8K test set: its gold solutions are correct with any form of the number, and wrong with another answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from trainer.evaluation.score import score_prediction, summarise
from trainer.problems.problem import DELIMITER, Problem
from trainer.problems.sources import read_problems
from trainer.shards.methods import VIEWS
from trainer.shards.segments import segment_texts

WRITTEN = {"generated_tokens": 1, "calculator_results_given": 0, "finished": True}
NUM_PROBLEMS = 1319


@pytest.fixture(scope="module")
def problems(shared_data: Path) -> list[Problem]:
    found = [item for item in read_problems("gsm8k", "test_socratic", str(shared_data / "gsm8k"))]
    assert len(found) == NUM_PROBLEMS and all(isinstance(problem, Problem) for problem in found)
    return found


def correct(problems: Iterable[Problem], text: Callable[[Problem], str]) -> dict[str, int]:
    """Return the number of correct predictions by rule if the model generates `text(problem)`."""
    summary: dict[str, Any] = summarise(
        [score_prediction(problem, text(problem), WRITTEN) for problem in problems]
    )
    assert summary["num_problems"] == NUM_PROBLEMS
    assert sum(group["strict"]["n"] for group in summary["by_num_steps"].values()) == NUM_PROBLEMS
    return {rule: score["correct"] for rule, score in summary["accuracy"].items()}


def view(problem: Problem, method: str) -> str:
    """Return the text that a model of that method is trained to generate."""
    return "".join(
        text for role, text in segment_texts(problem) if role in VIEWS[method].targets or role == 3
    )


def with_answer(problem: Problem, answer: str) -> str:
    body, delimiter, _ = view(problem, "socratic").rpartition(DELIMITER)
    return f"{body}{delimiter} {answer}"


@pytest.mark.parametrize("method", ["answer_only", "cot", "socratic"])
def test_every_gold_solution_is_correct(problems: list[Problem], method: str) -> None:
    everything = {"strict": NUM_PROBLEMS, "flexible": NUM_PROBLEMS}
    assert correct(problems, lambda problem: view(problem, method)) == everything


@pytest.mark.parametrize(
    "form",
    ["{:d}.", "${:d}", "{:,d}", "{:d}.00", "**{:d}**", " {:d} dollars", "{:d}\n", "{:d}\nAnd so on: 99999"],
)
def test_form_of_the_number_does_not_matter(problems: list[Problem], form: str) -> None:
    everything = {"strict": NUM_PROBLEMS, "flexible": NUM_PROBLEMS}
    assert (
        correct(problems, lambda problem: with_answer(problem, form.format(int(problem.answer))))
        == everything
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda gold: str(gold + 1),
        lambda gold: str(-gold if gold else 7),
        lambda gold: f"{gold}0" if gold else "10",
        lambda gold: f"{gold}.5",
        lambda gold: f"{gold}/7" if gold else "1/7",
        lambda gold: f"{gold} million",
    ],
)
def test_another_answer_is_wrong(problems: list[Problem], change: Callable[[int], str]) -> None:
    found = correct(problems, lambda problem: with_answer(problem, change(int(problem.answer))))
    assert found["strict"] == 0
    if "million" not in change(3):  # the flexible rule then takes the last number, which may be the gold one
        assert found["flexible"] == 0


def test_missing_or_corrupt_delimiter_is_not_strictly_correct(problems: list[Problem]) -> None:
    found = correct(problems, lambda problem: view(problem, "socratic").replace(DELIMITER, "###"))
    assert found["strict"] == 0 and found["flexible"] == NUM_PROBLEMS
    assert correct(problems, lambda problem: "") == {"strict": 0, "flexible": 0}
