"""Plans for the decomposer: in the views of guided methods and planners after the problem, in no other view."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.models.tokenizer import load_tokenizer
from trainer.problems import calculator
from trainer.settings import METHODS as NAMES
from trainer.settings import PrepareSettings
from trainer.shards import methods
from trainer.shards.inspect import print_examples
from trainer.shards.methods import VIEWS, SegmentRole, view_of
from trainer.shards.prepare import prepare
from trainer.shards.read import Shards

UNGUIDED = ("answer_only", "cot", "socratic", "decomposer", "decomposer_interleaved", "solver")
GUIDED = {
    "decomposer_operators": ("decomposer", SegmentRole.OPERATORS),
    "decomposer_equations": ("decomposer", SegmentRole.EQUATIONS),
    "decomposer_interleaved_operators": ("decomposer_interleaved", SegmentRole.OPERATORS),
    "decomposer_interleaved_equations": ("decomposer_interleaved", SegmentRole.EQUATIONS),
}
PLANNERS = {"planner_operators": SegmentRole.OPERATORS, "planner_equations": SegmentRole.EQUATIONS}

BAGS = {
    "question": "Tom has 3 bags of 4 apples and finds 5 more. How many?",
    "answer": "34",
    "steps": [
        {"question": "How many are in the bags?", "solution": "3*4 = <<3*4=12>>12 apples."},
        {"question": "And with the 5, twice?", "solution": "That is (12+5)*2=<<( 12+5)*2 =34.0>>34."},
    ],
}
PLAIN = {"question": "How many are 2 and 3?", "answer": "5", "steps": [{"question": "So?", "solution": "5"}]}


def prepare_records(tokenizer: Path | str, folder: Path, *records: dict[str, Any], **changes: Any) -> Shards:
    source = folder / "mine.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    values = {"data": "jsonl", "data_path": str(source), "tokenizer_name": str(tokenizer)}
    return prepare(PrepareSettings(**{**values, "output_dir": str(folder / "shards"), **changes}))


@pytest.fixture(scope="module")
def gsm8k(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("shards") / "gsm8k"
    values = {"data": "gsm8k", "data_path": str(shared_data / "gsm8k"), "split": "test_socratic"}
    tokenizer = str(shared_data / "gpt2-tokenizer")
    return prepare(
        PrepareSettings(**values, tokenizer_name=tokenizer, output_dir=str(folder), max_problems=400)
    )


def expected_view(tokenizer: Any, problem: Any, name: str) -> tuple[list[int], list[bool]]:
    """Return tokens and target mask of a view, computed from the problem's text without shards."""
    learns_questions = name in ("socratic", "decomposer", "decomposer_interleaved")
    learns_solutions = name in ("cot", "socratic", "solver")
    segments: list[tuple[str, bool]] = [(problem.question + "\n", False)]
    for step in problem.steps:
        if name not in ("answer_only", "cot"):
            segments.append((step.question + "\n", learns_questions))
        if name not in ("answer_only", "decomposer"):
            for text, is_result in calculator.split_annotations(step.solution + "\n"):
                segments.append((text, learns_solutions and not is_result))
    segments.append(("####", name != "solver"))
    if not name.startswith("decomposer"):
        segments.append((f" {problem.answer}<|endoftext|>", True))
    tokens, learned = [], []
    for text, is_target in segments:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        tokens += encoded
        learned += [is_target] * len(encoded)
    return tokens, learned


@pytest.mark.parametrize("name", UNGUIDED)
def test_unguided_views_contain_no_plan(gsm8k: Shards, shared_data: Path, name: str) -> None:
    tokenizer = load_tokenizer(shared_data / "gpt2-tokenizer")
    for index in range(0, len(gsm8k), 10):
        tokens, learned = gsm8k.example(index, view_of(name))
        assert (tokens.tolist(), learned.tolist()) == expected_view(tokenizer, gsm8k.problem(index), name)


def test_a_guided_view_is_the_plain_one_with_the_plan_after_the_problem(gsm8k: Shards) -> None:
    num_checked = 0
    for name, (plain, role) in GUIDED.items():
        view = view_of(name)
        usable = np.flatnonzero(gsm8k.lengths(view))
        for index in usable[::10].tolist():
            tokens, learned = gsm8k.example(index, view)
            plain_tokens, plain_learned = gsm8k.example(index, view_of(plain))
            plan, start = gsm8k.segment_tokens(index, role), len(gsm8k.prompt(index))
            assert len(plan) and tokens[start : start + len(plan)].tolist() == plan.tolist()
            end = start + len(plan)
            assert np.delete(tokens, slice(start, end)).tolist() == plain_tokens.tolist()
            assert np.delete(learned, slice(start, end)).tolist() == plain_learned.tolist()
            assert not learned[:end].any(), "the plan is no target of a decomposer"
            num_checked += 1
    assert num_checked > 100


def test_a_planner_reads_the_problem_and_learns_the_plan(gsm8k: Shards) -> None:
    for name, role in PLANNERS.items():
        for index in range(0, len(gsm8k), 10):
            plan = gsm8k.segment_tokens(index, role)
            if len(plan):
                tokens, learned = gsm8k.example(index, view_of(name))
                assert tokens.tolist() == [*gsm8k.prompt(index).tolist(), *plan.tolist()]
                assert tokens[learned].tolist() == plan.tolist()


def test_text_of_a_plan(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "gpt2-tokenizer")
    shards = prepare_records(shared_data / "gpt2-tokenizer", tmp_path, BAGS, PLAIN)
    assert [role for role, _ in shards.segments(0)[:3]] == [
        SegmentRole.PROBLEM,
        SegmentRole.OPERATORS,
        SegmentRole.EQUATIONS,
    ]
    text = {role: tokenizer.decode(shards.segment_tokens(0, role).tolist()) for role in methods.GUIDANCE}
    assert text == {
        SegmentRole.OPERATORS: "operators: * +*\n",
        SegmentRole.EQUATIONS: "equations: 3*4; ( 12+5)*2\n",
    }
    assert tokenizer.decode(shards.prompt(0).tolist()) == BAGS["question"] + "\n"

    # Without a calculation there is no plan, and so no example for methods that need one.
    assert {role for role, _ in shards.segments(1)}.isdisjoint(methods.GUIDANCE)
    for name in NAMES:
        guided = methods.guidance_of(name) is not None
        assert bool(shards.lengths(view_of(name))[1]) is not guided
        assert shards.facts["problems_per_method"][name] == (1 if guided else 2)


def test_guidance_excludes_no_problem(shared_data: Path, tmp_path: Path) -> None:
    """max_length limits the length without guidance."""
    gpt2 = shared_data / "gpt2-tokenizer"
    shards = prepare_records(gpt2, tmp_path, BAGS)
    without = int(shards.lengths(view_of("socratic"))[0])
    assert int(shards.lengths(view_of("decomposer_interleaved_equations"))[0]) > without - 10
    assert sum(len(tokens) for _, tokens in shards.segments(0)) > without
    assert shards.facts["longest_example"] == without
    exact = prepare_records(gpt2, tmp_path, BAGS, max_length=without, output_dir=str(tmp_path / "exact"))
    assert len(exact) == 1
    with pytest.raises(UserError, match="too_long"):
        prepare_records(gpt2, tmp_path, BAGS, max_length=without - 1, output_dir=str(tmp_path / "short"))


def test_kinds_of_methods() -> None:
    assert set(NAMES) == set(VIEWS), "the settings offer every view"
    assert [name for name in VIEWS if methods.is_decomposer(name)] == [
        *("decomposer", "decomposer_interleaved"),
        *GUIDED,
    ]
    interleaved = [name for name in VIEWS if "interleaved" in name]
    assert [name for name in VIEWS if methods.is_interleaved(name)] == interleaved
    assert [name for name in VIEWS if methods.is_planner(name)] == list(PLANNERS)
    guidance = {name: role for name in VIEWS if (role := methods.guidance_of(name)) is not None}
    assert guidance == PLANNERS | {name: role for name, (_, role) in GUIDED.items()}


def test_inspect_shows_the_plan_only_in_views_that_contain_it(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_records(shared_data / "gpt2-tokenizer", tmp_path, BAGS)

    def printed(name: str) -> str:
        capsys.readouterr()
        print_examples(str(tmp_path / "shards"), name, 1)
        return capsys.readouterr().out

    equations = printed("decomposer_interleaved_equations")
    assert "equations: 3*4; ( 12+5)*2" in equations and "operators:" not in equations
    planner = printed("planner_operators")
    assert "operators: * +*" in planner and "in the bags" not in planner
    assert "operators:" not in printed("socratic")


@pytest.mark.parametrize(
    ("expression", "operators"),
    [("16-3-4", "--"), ("(3+4)*2", "+*"), ("-3+4", "+"), ("3*-2", "*"), ("2×3÷4−1", "*/-"), ("12", "")],
)
def test_operators_of_an_expression(expression: str, operators: str) -> None:
    assert calculator.evaluate(expression) is not None
    assert calculator.operators(expression) == operators


def test_expressions_of_a_text() -> None:
    text = "a <<3*4=12>>12, b <<10/4=2.50>>2.50, c <<7//2=3>>3, d <<5%=1>>, <<=3>> << 1+1 =2>>"
    assert calculator.annotated_expressions(text) == ["3*4", "10/4", "1+1"]
