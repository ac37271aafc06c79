"""Tests of prompt templates and exemplars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.problems.problem import Problem, Step
from trainer.teacher.decontaminate import HeldOutQuestions
from trainer.teacher.filter import FilterConfig, filter_sample
from trainer.teacher.prompts import BUILT_IN_PROMPTS, PromptBuilder, choose_exemplars
from trainer.teacher.settings import AnnotateSettings

APPLES = Problem("a", "Ann has 3 bags of 4 apples. How many apples?", "12")
LAPTOP = Problem("b", "Did Aristotle use a laptop?", "no", facts=("Aristotle died in 322 BC.",))
SOLVED = Problem(
    "c", "Bo has 2 nuts and 3 more. How many?", "5", (Step("How many nuts?", "2+3 = <<2+3=5>>5"),)
)
BASE = {"data_path": "x", "output_dir": "x", "base_url": "http://x/v1", "model": "m"}


@pytest.mark.parametrize("style", ["cot", "socratic"])
@pytest.mark.parametrize("problem", [APPLES, LAPTOP], ids=["number", "yes_no"])
@pytest.mark.parametrize("gold_hint", [False, True])
def test_built_in_prompts(style: str, problem: Problem, gold_hint: bool) -> None:
    prompt = PromptBuilder(BUILT_IN_PROMPTS / f"{style}.j2", style, [], gold_hint, with_facts=True).build(
        problem
    )
    assert prompt.endswith("\nSolution:") and problem.question in prompt
    assert ("sub-question" in prompt) is (style == "socratic")
    assert ("<<expression=result>>" in prompt) is (problem is APPLES)
    assert all(fact in prompt for fact in problem.facts)
    assert (f"Correct answer: {problem.answer}\n" in prompt) is gold_hint
    assert ("is given" in prompt) is gold_hint
    assert "\n\n\n" not in prompt and "  " not in prompt


def test_the_answer_is_not_shown_without_the_hint() -> None:
    problem = Problem("a", "Ann has some apples. How many apples?", "987654")
    assert "987654" not in PromptBuilder(BUILT_IN_PROMPTS / "cot.j2", "cot", [SOLVED], False, True).build(
        problem
    )


@pytest.mark.parametrize("style", ["cot", "socratic"])
def test_exemplars_pass_the_filter(style: str) -> None:
    prompt = PromptBuilder(BUILT_IN_PROMPTS / f"{style}.j2", style, [SOLVED], False, False).build(APPLES)
    shown = prompt.partition(f"Problem: {SOLVED.question}\nSolution:\n")[2].partition("\n\n")[0]
    assert filter_sample(shown, "stop", SOLVED, FilterConfig(style)).is_kept
    assert prompt.index(SOLVED.question) < prompt.index(APPLES.question)


def test_no_problem_is_its_own_exemplar() -> None:
    builder = PromptBuilder(BUILT_IN_PROMPTS / "cot.j2", "cot", [SOLVED], False, False)
    assert "<<2+3=5>>" not in builder.build(Problem("d", SOLVED.question, "5"))


def test_exemplars_of_another_kind_are_refused() -> None:
    with pytest.raises(UserError, match="asks for a yes_no but no exemplar"):
        PromptBuilder(BUILT_IN_PROMPTS / "cot.j2", "cot", [SOLVED], False, False).build(LAPTOP)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ question }} {{ answer }}", "give --gold_hint"),
        ("{{ qestion }}", "'qestion' is undefined"),
        ("{% if %}", "line 1"),
        ("{{ question.__class__.__mro__ }}", "unsafe"),
        ("{{ exemplars.append(1) }}", "unsafe"),
        ("{% for i in range(10000000) %}x{% endfor %}", "Range too big"),
    ],
)
def test_a_prompt_file_with_a_fault(tmp_path: Path, template: str, message: str) -> None:
    file = tmp_path / "mine.j2"
    file.write_text(template)
    with pytest.raises(UserError, match=message) as refused:
        PromptBuilder(file, "cot", [], False, False).build(APPLES)
    assert "mine.j2" in str(refused.value)


def test_user_prompt_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Rechne: {{ question }}\n\n")
    assert PromptBuilder(file, "cot", [], False, False).build(APPLES) == f"Rechne: {APPLES.question}"
    with pytest.raises(UserError, match="cannot read the prompt file"):
        PromptBuilder(tmp_path / "nowhere", "cot", [], False, False)


def test_exemplars_are_drawn_with_the_seed_and_are_no_test_questions() -> None:
    nothing = HeldOutQuestions([])
    first, again, other = (
        choose_exemplars(AnnotateSettings(exemplars_from_gold=3, seed=seed, **BASE), nothing)
        for seed in (0, 0, 1)
    )
    assert first == again and len(first) == 3 and first != other
    without = choose_exemplars(
        AnnotateSettings(exemplars_from_gold=3, **BASE), HeldOutQuestions([("t", first[0].question)])
    )
    assert first[0] not in without and len(without) == 3


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "x", "answer": "5"}, "has no steps"),
        ({"question": "x", "answer": "5", "steps": [{"solution": "2+3 = 5"}]}, "step without sub-question"),
        ({"question": "x", "answer": "5", "steps": [{"question": "y?"}]}, "step without solution"),
        ({"question": "x", "answer": "5", "steps": [{"question": "y", "solution": "5"}]}, "rejected itself"),
        (
            {"question": "Is it?", "answer": "5", "steps": [{"question": "y?", "solution": "5"}]},
            "the test question t",
        ),
        ({"question": "x"}, "line 2: no_answer"),
    ],
)
def test_an_exemplar_with_a_fault(tmp_path: Path, record: dict, message: str) -> None:
    file = tmp_path / "mine.jsonl"
    good = {"question": "z", "answer": "5", "steps": [{"question": "y?", "solution": "5"}]}
    file.write_text(json.dumps(good) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(UserError, match=message):
        choose_exemplars(AnnotateSettings(exemplars=str(file), **BASE), HeldOutQuestions([("t", "Is it?")]))


def test_too_few_exemplars(shared_data: Path) -> None:
    settings = AnnotateSettings(
        exemplars_from_gold=3, exemplars_data=f"svamp:{shared_data}/svamp:train", **BASE
    )
    with pytest.raises(UserError, match="0 problems have good sub-questions and solutions"):
        choose_exemplars(settings, HeldOutQuestions([]))
