"""Tests of the filter, on single chains and on the gold chains of GSM8K."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.problems.problem import Problem, Step
from trainer.problems.sources import read_problems
from trainer.teacher.filter import FILTER_REASONS, FilterConfig, evaluates_to, filter_sample
from trainer.teacher.prompts import solution_text

PROBLEM = Problem("p", "How many?", "10", steps=(Step("", "x"),))
SOCRATIC, COT = FilterConfig("socratic"), FilterConfig("cot")
GOOD = "How many apples?\n3*4 = <<3*4=12>>12\nHow many are left?\n12-2 = <<12-2=10>>10\n#### 10"


def test_a_correct_chain_is_kept() -> None:
    result = filter_sample(GOOD, "stop", PROBLEM, SOCRATIC)
    assert result.is_kept
    assert result.steps == (
        Step("How many apples?", "3*4 = <<3*4=12>>12"),
        Step("How many are left?", "12-2 = <<12-2=10>>10"),
    )


@pytest.mark.parametrize(
    ("text", "finish_reason", "config", "reason"),
    [
        (GOOD, "length", SOCRATIC, "truncated"),
        ("", "content_filter", SOCRATIC, "filtered"),
        (GOOD.replace("#### 10", "#### 12"), "stop", SOCRATIC, "wrong_answer"),
        (GOOD.replace("#### 10", "#### 10 million"), "stop", SOCRATIC, "wrong_answer"),
        (GOOD.replace("<<3*4=12>>12", "<<3*4=13>>13"), "stop", SOCRATIC, "wrong_arithmetic"),
        (GOOD.replace("<<3*4=12>>", "<<12=3*4>>"), "stop", SOCRATIC, "wrong_arithmetic"),
        (GOOD.replace("<<3*4=12>>", "<<2**3=8>>"), "stop", SOCRATIC, "wrong_arithmetic"),
        (GOOD.replace("<<3*4=12>>", "<<x=12>>"), "stop", SOCRATIC, "wrong_arithmetic"),
        (GOOD.replace("<<3*4=12>>", "<<3*4>>"), "stop", SOCRATIC, "bad_annotation"),
        (GOOD.replace("<<3*4=12>>", "<<3*4=6+6=12>>"), "stop", SOCRATIC, "bad_annotation"),
        (GOOD.replace("<<3*4=12>>", "<<3*4=12"), "stop", SOCRATIC, "bad_annotation"),
        (GOOD, "stop", FilterConfig("socratic", min_steps=3), "too_few_steps"),
        (GOOD, "stop", FilterConfig("socratic", max_steps=1), "too_many_steps"),
        ("It is 10.\n#### 10", "stop", FilterConfig("cot", require_annotations=True), "no_annotation"),
        ("I do not know.", "stop", COT, "no_answer"),
    ],
)
def test_reasons(text: str, finish_reason: str, config: FilterConfig, reason: str) -> None:
    result = filter_sample(text, finish_reason, PROBLEM, config)
    assert (result.is_kept, result.reason) == (False, reason)
    assert reason in FILTER_REASONS


@pytest.mark.parametrize(("gold", "answer", "kept"), [("yes", "Yes.", True), ("no", "yes", False)])
def test_yes_and_no(gold: str, answer: str, kept: bool) -> None:
    text = f"Is it so?\nIt is what it is.\n#### {answer}"
    assert filter_sample(text, "stop", Problem("p", "Is it?", gold), SOCRATIC).is_kept is kept


@pytest.mark.parametrize(
    ("expression", "result", "is_right"),
    [
        ("3*4", "12", True),
        ("3*4", " 12.0 ", True),
        ("900+180", "1,080", True),
        ("1-4", "-3", True),
        ("10/3", "3.33", True),
        ("2/3", ".67", True),
        ("10/3", "3.3", False),  # rounding needs at least two decimals
        ("10/3", "3.34", False),
        ("10/3", "3", False),
        ("3*4", "6+6", False),
        ("5%", "0.05", False),
        ("3*4", "", False),
        ("3*4", "13", False),
    ],
)
def test_recomputing(expression: str, result: str, is_right: bool) -> None:
    assert evaluates_to(expression, result) is is_right


def test_gold_chains_of_gsm8k_are_kept_and_perturbed_ones_are_not(shared_data: Path) -> None:
    """Rejected: one with `<<3/4=3/4>>`, and 58 whose generated sub-questions are no questions ("Define a variable")."""
    read = read_problems("gsm8k", "test_socratic", str(shared_data / "gsm8k"))
    problems = [problem for problem in read if isinstance(problem, Problem)]
    assert len(problems) == 1319
    reasons: dict[str, int] = {}
    for problem in problems:
        for style in ("cot", "socratic"):
            text = solution_text(problem, style)
            reason = filter_sample(text, "stop", problem, FilterConfig(style)).reason
            reasons[f"{style} {reason}"] = reasons.get(f"{style} {reason}", 0) + 1
        wrong = text.rpartition("####")[0] + "#### 123456789"
        assert not filter_sample(wrong, "stop", problem, FilterConfig("socratic")).is_kept
    assert reasons == {
        "cot ": 1318,
        "cot wrong_arithmetic": 1,
        "socratic ": 1260,
        "socratic unpaired": 58,
        "socratic wrong_arithmetic": 1,
    }
