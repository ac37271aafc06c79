from __future__ import annotations

import pytest

from tests.report.synthetic_answers import MISTAKES, answer, possible_mistakes, problems
from trainer.problems import answers
from trainer.report.error_types import find_error, same_question
from trainer.report.solution_steps import SolutionStep, parse

APPLES, EATEN = "How many apples does Tom have?", "How many apples are left?"
GOLD = (
    SolutionStep(APPLES, "Tom has 3*4 = <<3*4=12>>12 apples."),
    SolutionStep(EATEN, "He has 12-5 = <<12-5=7>>7 apples left."),
)
MOON = "How many miles is it to the moon?"
PROBLEM = "Tom has 3 bags of four apples. He eats 5 of them. How many apples are left?"


def _error(
    text: str,
    mode: str = "socratic",
    gold: tuple[SolutionStep, ...] = GOLD,
    right: str = "7",
    problem: str = PROBLEM,
) -> tuple:
    strict = answers.extract_answer(text, "strict")
    is_right = answers.answers_match(strict, right)
    return find_error(parse(text, mode), is_right, bool(strict), mode, gold, problem)


def _socratic(
    first: str, second: str, answer: str = "#### 9", questions: tuple[str, str] = (APPLES, EATEN)
) -> str:
    return f"{questions[0]}\n{first}\n{questions[1]}\n{second}\n{answer}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (_socratic(GOLD[0].solution, GOLD[1].solution, "#### 7"), ("right", None)),
        (_socratic(GOLD[0].solution, "He has 12-6 = <<12-6=6>>6."), ("copying", 1)),  # 6 is nowhere
        (_socratic(GOLD[0].solution, "He has 12+6 = <<12+6=18>>18."), ("copying", 1)),  # 6 is checked before +
        (_socratic(GOLD[0].solution, "He has 12-3 = <<12-3=9>>9."), ("copying", 1)),  # 3 instead of 5
        (_socratic(GOLD[0].solution, "He has 3-5 = <<3-5=-2>>-2."), ("copying", 1)),  # 3 instead of the result 12
        (_socratic(GOLD[0].solution, "He has 12+5 = <<12+5=17>>17."), ("operation", 1)),
        (_socratic(GOLD[0].solution, "He has 5-12 = <<5-12=-7>>-7."), ("operation", 1)),  # another order
        (_socratic(GOLD[0].solution, "He has 12-5-3 = <<12-5-3=4>>4."), ("operation", 1)),  # an operator more
        (_socratic("Tom has 3×4 = <<3+4=7>>7.", "<<12-5=9>>9"), ("operation", 0)),  # four is written as a word
        (_socratic(GOLD[0].solution, "<<12-7=5>>5"), ("copying", 1)),
        (_socratic("Tom has 3+4 = <<3+4=7>>8.", "He has <<8-5=3>>3."), ("operation", 0)),  # before the sum is wrong
        (_socratic(GOLD[0].solution, "He has 12-5 = <<12-5=9>>9."), ("arithmetic", 1)),
        (_socratic("Tom has 3 x 4 = 13 apples.", "He has 13 - 5 = 8."), ("arithmetic", 0)),  # no annotation
        (_socratic("Tom has 3*4 = <<4*3=12>>12.", "<<3*4-5=8>>8"), ("arithmetic", 1)),  # other words
        (_socratic("Tom has <<3+4=7>>7.", GOLD[1].solution, questions=(MOON, EATEN)), ("subquestion", 0)),
        (_socratic(GOLD[0].solution, GOLD[1].solution, questions=(MOON, EATEN)), ("other", None)),  # harmless
        (f"{APPLES}\n{GOLD[0].solution}\n#### 12", ("subquestion", 1)),  # one too few
        (_socratic(*(step.solution for step in GOLD), f"{MOON}\nIt is <<7*2=14>>14.\n#### 14"), ("subquestion", 2)),
        (_socratic(GOLD[0].solution, "He has some left."), ("other", 1)),  # no expression
        (_socratic(GOLD[0].solution, GOLD[1].solution), ("other", None)),  # right steps, another answer
        (_socratic(GOLD[0].solution, GOLD[1].solution, ""), ("no_answer", None)),
        (_socratic(GOLD[0].solution, "<<1+1=2>>2", "####"), ("no_answer", 1)),  # nothing after it
        ("", ("no_answer", None)),
        ("#### 9", ("other", None)),  # an answer without steps
    ],
)  # fmt: skip
def test_errors_of_socratic_answers(text: str, expected: tuple) -> None:
    assert _error(text) == expected


@pytest.mark.parametrize("mode", ["iterative_ahead", "iterative_interleaved", "iterative_ahead+operators"])
def test_errors_of_pairs_include_the_subquestion(mode: str) -> None:
    text = _socratic("Tom has <<3+4=7>>7.", GOLD[1].solution, questions=(MOON, EATEN))
    solution = parse(text, "iterative_ahead")
    assert find_error(solution, False, True, mode, GOLD, PROBLEM)[0] == "subquestion"
    # With the right sub-question, the solver made the first mistake: it copied, chose or computed wrongly.
    for solved, expected in (("3*7=21", "copying"), ("3+4=7", "operation"), ("3*4=13", "arithmetic")):
        text = _socratic(f"Tom has <<{solved}>>.", GOLD[1].solution)
        solution = parse(text, "iterative_ahead")
        assert find_error(solution, False, True, mode, GOLD, PROBLEM) == (expected, 0)


def test_no_subquestion_errors_with_gold_subquestions() -> None:
    text = _socratic("Tom has <<3+4=7>>7.", GOLD[1].solution, questions=(MOON, EATEN))
    assert _error(text, "gold_subquestions") == ("operation", 0)
    assert _error(f"{APPLES}\n{GOLD[0].solution}\n#### 12", "gold_subquestions") == ("operation", 1)


def test_chain_of_thought_has_no_subquestions_and_may_take_steps_together() -> None:
    assert _error(f"{GOLD[0].solution}\n<<12-6=6>>6\n#### 6", "cot") == ("copying", 1)
    assert _error(f"{GOLD[0].solution}\n#### 12", "cot") == ("operation", 1)  # a step too few
    assert _error("He has 3*4-5 = <<3*4-5=7>>7.\n#### 8", "cot") == ("other", None)  # both steps in one
    two = (SolutionStep("", "<<3*4=12>>12 and <<12*2=24>>24"),)
    assert _error("<<3*4=12>>12\n<<12*2=20>>20\n#### 20", "cot", two, "24") == (
        "arithmetic",
        1,
    )  # one step in two


def test_gold_without_steps() -> None:
    assert (
        _error("<<3*4=12>>12\n#### 12", "cot", ()) == ("other", None) == _error("#### 12", "answer_only", ())
    )
    assert _error("<<3*4=12>>12", "cot", ())[0] == "no_answer"


def test_gold_questions_without_solutions_are_compared_by_their_words() -> None:
    gold = (SolutionStep("What is a yeti made of?", ""), SolutionStep("Can that float?", ""))
    text = "What is a yeti made of?\nIt is made of ice.\nWho owns the moon?\nNobody.\n#### no"
    assert _error(text, "socratic", gold, "yes") == ("subquestion", 1)


def test_results_written_to_fewer_decimals_are_right() -> None:
    gold = (SolutionStep("", "1/3 = <<1/3=0.333333>>0.333333"),)
    assert _error("1/3 = <<1/3=0.33>>0.33\n#### 5", "cot", gold, "0.33")[0] == "other"


@pytest.mark.parametrize(
    ("ours", "gold", "same"),
    [
        ("How many apples does Tom have?", "How many apples has Tom?", True),
        ("How many apples does Tom have?", "How many apples does Ann have?", False),  # names
        ("How much do 3 apples cost?", "How much do 4 apples cost?", False),  # numbers
        ("How much do 3 apples cost?", "What is the price of 3 lamps?", False),  # words
        ("Tom has how many apples?", "How many apples does Tom have?", True),  # a name may come first
        ("How many of Tom's apples are left?", "How many apples of Tom are left?", True),
    ],
)
def test_subquestions_are_compared_by_their_words(ours: str, gold: str, same: bool) -> None:
    assert same_question(ours, gold) is same


@pytest.mark.parametrize(
    "mode",
    ["answer_only", "cot", "socratic", "iterative_ahead", "iterative_interleaved", "gold_subquestions"],
)
def test_planted_mistakes_are_found_where_they_were_planted(mode: str) -> None:
    for index, problem in enumerate(problems(60)):
        gold = tuple(SolutionStep(step.question, step.solution) for step in problem.steps)
        at = index % len(gold)
        assert _error(answer(problem, mode), mode, gold, problem.answer, problem.question) == ("right", None)
        for mistake in possible_mistakes(mode):
            text = answer(problem, mode, mistake, at)
            found = _error(text, mode, gold, problem.answer, problem.question)
            where = at if mistake in MISTAKES[:4] else found[1]
            assert found == (mistake, where), problem
