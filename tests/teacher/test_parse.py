"""Tests of the parser: decorated chains, and reasons of texts that are no chains."""

from __future__ import annotations

import pytest

from trainer.teacher.filter import ParseError, parse_steps

PLAIN = [("How many apples?", "3*4 = <<3*4=12>>12"), ("How many are left?", "12-2 = <<12-2=10>>10")]


@pytest.mark.parametrize(
    "text",
    [
        "How many apples?\n3*4 = <<3*4=12>>12\nHow many are left?\n12-2 = <<12-2=10>>10\n#### 10",
        "\n\nHow many apples?\n\n3*4 = <<3*4=12>>12\n\nHow many are left?\n12-2 = <<12-2=10>>10\n\n#### 10\n",
        "1. How many apples?\n3*4 = <<3*4=12>>12\n2. How many are left?\n12-2 = <<12-2=10>>10\n#### 10",
        "Q: How many apples?\nA: 3*4 = <<3*4=12>>12\nQ: How many are left?\nA: 12-2 = <<12-2=10>>10\n#### 10",
        "Q1. How many apples?\nA1. 3*4 = <<3*4=12>>12\nQ2. How many are left?\nA2. 12-2 = <<12-2=10>>10\n#### 10",
        "**Sub-question 1:** How many apples?\n**Answer 1:** 3*4 = <<3*4=12>>12\n"
        "**Sub-question 2:** How many are left?\n**Answer 2:** 12-2 =\n<<12-2=10>>10\n#### 10",
        "Question 1:\nHow many apples?\nSolution 1:\n3*4 = <<3*4=12>>12\n"
        "Question 2:\nHow many are left?\nSolution 2:\n12-2 = <<12-2=10>>10\n#### 10",
        "Here is the solution:\n- How many apples?\n- 3*4 = <<3*4=12>>12\n- How many are left?\n"
        "- 12-2 = <<12-2=10>>10\n#### 10\n\nI hope this helps!",
        "```\nHow many apples? ** 3*4 = <<3*4=12>>12\nHow many are left? ** 12-2 = <<12-2=10>>10\n```\n#### 10",
    ],
)
def test_decorations_are_removed(text: str) -> None:
    assert [(step.question, step.solution) for step in parse_steps(text, "socratic")] == PLAIN


def test_a_sentence_that_begins_like_a_label_is_none() -> None:
    chain = parse_steps("Does A. Lincoln fit?\nA. Lincoln is 193 cm tall.\n#### no", "socratic")
    assert chain[0].solution == "A. Lincoln is 193 cm tall."


@pytest.mark.parametrize(
    ("line", "solution"),
    [
        ("3.5 + 2 = <<3.5+2=5.5>>5.5", "3.5 + 2 = <<3.5+2=5.5>>5.5"),
        ("2. Step by step", "Step by step"),
        ("Step 3: she has 5", "she has 5"),
        ("* **Step 3:** she has 5", "she has 5"),
        ("-5 is cold", "-5 is cold"),
        ("Q: is no label here", "Q: is no label here"),
        ("First we count 3 bags:", "First we count 3 bags:"),
    ],
)
def test_lines_of_a_chain_of_thought(line: str, solution: str) -> None:
    assert [step.solution for step in parse_steps(f"{line}\n#### 5", "cot")] == [solution]


@pytest.mark.parametrize(
    ("text", "style", "reason"),
    [
        ("", "cot", "no_answer"),
        ("3+4 = 7", "cot", "no_answer"),
        ("3+4 = 7\n####", "cot", "no_answer"),
        ("3+4 = 7\n####\n7", "cot", "no_answer"),
        ("#### 7", "cot", "no_steps"),
        ("Sure:\n#### 7", "socratic", "no_steps"),
        ("3+4 = 7\n#### 7\n5+6 = 11\n#### 11", "cot", "bad_step"),
        ("3+4 = \0 7\n#### 7", "cot", "bad_step"),
        ("3+4 = \ud83d\n#### 7", "cot", "bad_step"),
        ("3+4 = 7\n#### 7", "socratic", "unpaired"),
        ("What?\n#### 7", "socratic", "unpaired"),
        ("What?\nWhy?\n3+4 = 7\n#### 7", "socratic", "unpaired"),
        ("What?\n3+4\n= 7\n#### 7", "socratic", "unpaired"),
        ("What?\n3+4 = 7\nWhy?\n#### 7", "socratic", "unpaired"),
        ("Q: What?\nQ: Why?\nA: 3+4 = 7\n#### 7", "socratic", "unpaired"),
        ("Q: What?\nA:\n#### 7", "socratic", "unpaired"),
        ("We count.\nQ: What?\nA: 3+4 = 7\n#### 7", "socratic", "unpaired"),
    ],
)
def test_reasons(text: str, style: str, reason: str) -> None:
    with pytest.raises(ParseError) as refused:
        parse_steps(text, style)
    assert refused.value.reason == reason
