from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from trainer.problems import answers
from trainer.report.error_types import find_error
from trainer.report.solution_steps import SolutionStep, parse


def test_texts_are_split_by_mode() -> None:
    text = "How many?\n3*4 = <<3*4=12>>12\nAnd now?\n12-5 = <<12-5=7>>7\n#### 7"
    socratic, cot = parse(text, "socratic"), parse(text, "cot")
    assert [step.question for step in socratic.steps] == ["How many?", "And now?"]
    assert [step.value for step in socratic.steps] == [12, 7] and socratic.ending == "#### 7"
    assert len(cot.steps) == 4 and {step.question for step in cot.steps} == {""}
    assert parse(text, "gold_subquestions") == parse(text, "iterative_ahead") == socratic
    assert parse(text, "few_shot") == socratic  # its lines have question marks
    assert [s.solution for s in parse("3+4 = 7\n#### 7", "few_shot").steps] == ["3+4 = 7"]


def test_a_missing_line_does_not_swap_the_later_ones() -> None:
    no_question = parse("<<3*4=12>>12\nAnd now?\nIt is <<12-5=7>>7\n#### 7", "socratic").steps
    assert [(bool(s.question), s.value) for s in no_question] == [(False, 12), (True, 7)]
    no_solution = parse("How many?\nAnd now?\nIt is <<12-5=7>>7\nWhat else?", "socratic").steps
    assert [(s.question, bool(s.solution)) for s in no_solution] == [
        *(("How many?", False), ("And now?", True), ("What else?", False))
    ]


def test_no_text_and_several_delimiters() -> None:
    assert parse("", "socratic").steps == () and parse("", "cot").ending == ""
    twice = parse("a 3\n#### 3\nb 4\n#### 4\nmore", "cot")
    assert len(twice.steps) == 1 and twice.ending == "#### 4"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("It costs $3 x 4 = $12 in all", [("3 * 4", 12, 12)]),
        ("so 2,000 + 1 = 2,001.", [("2,000 + 1", 2001, 2001)]),
        ("(3 + 4) * 2 = 14", [("(3 + 4) * 2", 14, 14)]),
        ("<<3+4=8>>8 and 1+1 = 2", [("3+4", 7, 8)]),  # annotations go first
        ("<<3+=8>>8", [("3+", None, 8)]),
        ("1/3 = <<1/3=0.333333>>", [("1/3", Fraction("0.333333"), Fraction("0.333333"))]),
        ("in 1990-1995 nothing = nothing", []),
    ],
)
def test_calculations_of_a_line(line: str, expected: list) -> None:
    assert [(e.expression, e.computed, e.stated) for e in SolutionStep("", line).equations] == expected


def test_the_value_of_a_step_without_a_calculation_is_its_last_number() -> None:
    assert SolutionStep("", "He had 3 and now has 5 apples.").value == 5
    assert SolutionStep("", "He has some.").value is None


def test_results_that_equal_the_calculators() -> None:
    assert SolutionStep("", "<<1/2=0.5>>0.5 <<1/2=.5>>.5 <<3*4=13>>13").computed == [True, False, False]


def test_long_garbage_is_parsed_quickly() -> None:
    for text in ("6" * 20_000, "1,1" * 8_000, "(3+" * 8_000, "3 + " * 8_000, "<<" * 10_000):
        assert parse(text, "socratic").steps[0].equations == []


def test_gold_solutions_are_right_step_by_step(shared_data: Path) -> None:
    """GSM8K against itself: with a wrong final answer, no gold step is reported as wrong."""
    lines = (shared_data / "gsm8k" / "test_socratic.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[::4]:
        *steps, ending = json.loads(line)["answer"].split("\n")
        pairs = [
            step.split(" ** ", 1) for step in steps if " ** " in step and step.split(" ** ", 1)[1].strip()
        ]
        gold = tuple(SolutionStep(question.strip(), solution.strip()) for question, solution in pairs)
        text = "\n".join(f"{step.question}\n{step.solution}" for step in gold) + f"\n{ending}1"
        assert answers.extract_answer(text) == ending.removeprefix("#### ") + "1"
        found = find_error(parse(text, "socratic"), False, True, "socratic", gold, "")
        assert found == ("other", None), text
