"""Modes of one model and of pairs, by the methods that the models were trained with."""

from __future__ import annotations

import pytest

from trainer.errors import UserError
from trainer.evaluation.decoding import resolve_mode, resolve_pair
from trainer.evaluation.model_reference import ModelReference


def test_modes() -> None:
    assert resolve_mode("auto", "cot") == ("cot", False)
    assert resolve_mode("cot", "cot") == ("cot", False)
    assert resolve_mode("answer_only", "answer_only") == ("answer_only", False)
    assert resolve_mode("answer_only", "socratic") == ("answer_only", True)
    assert resolve_mode("cot", None) == ("cot", False)
    for mode, method in (
        ("auto", None),
        ("cot", "socratic"),
        ("auto", "decomposer"),
        ("answer_only", "solver"),
    ):
        with pytest.raises(UserError):
            resolve_mode(mode, method)


def pair(**methods: str | None) -> dict[str, ModelReference]:
    return {
        role: ModelReference(f"runs/{method}", "export", {"method": method})
        for role, method in methods.items()
    }


def test_modes_of_pairs() -> None:
    assert resolve_pair(pair(decomposer="decomposer", solver="solver"), "planner") == ("iterative_ahead", "")
    for decomposer in ("decomposer_interleaved", "socratic"):
        models = pair(decomposer=decomposer, solver="socratic")
        assert resolve_pair(models, "planner") == ("iterative_interleaved", "")
    assert resolve_pair(pair(solver="solver"), "planner") == ("gold_subquestions", "")
    guided = {"decomposer": "decomposer_equations", "solver": "solver"}
    assert resolve_pair(pair(**guided), "gold") == ("iterative_ahead", "equations")
    assert resolve_pair(pair(**guided, planner="planner_equations"), "planner")[1] == "equations"


@pytest.mark.parametrize(
    ("models", "guidance_from", "message"),
    [
        (pair(decomposer="decomposer", solver="decomposer"), "planner", "a solver is of method solver or socratic"),
        (pair(decomposer="solver", solver="solver"), "planner", r"a decomposer is of method decomposer\*"),
        (pair(decomposer="cot", solver="solver"), "planner", "runs/cot is of method cot"),
        (pair(solver="answer_only"), "planner", "a solver is of method"),
        (pair(decomposer="decomposer", solver=None), "planner", "solver runs/None does not record its training method"),
        (pair(decomposer="decomposer_operators", solver="solver"), "planner", "guided by operators; give a planner"),
        (pair(decomposer="decomposer", solver="solver"), "gold", "reads no plan"),
        (pair(decomposer="decomposer", solver="solver", planner="planner_equations"), "planner", "reads no plan"),
        (
            pair(decomposer="decomposer_operators", solver="solver", planner="planner_equations"),
            "planner",
            "is guided by operators",
        ),
        (pair(decomposer="decomposer_operators", solver="solver", planner="cot"), "planner", r"of method planner_\*"),
    ],
)  # fmt: skip
def test_roles_that_do_not_fit_the_method(
    models: dict[str, ModelReference], guidance_from: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve_pair(models, guidance_from)
