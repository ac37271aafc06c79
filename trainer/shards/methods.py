"""A problem is stored once; a method is a view of it: which roles it reads and which of these it learns.

`decomposer` and `solver` are complementary masks over one sequence: training the solver on a problem of n steps
costs one forward pass, not n, with the gradient of n separate examples (attention is causal, so the loss of step i
sees exactly the prefix a separate example would have had). The idea of the two models is Shridhar, Stolfo and
Sachan, "Distilling Reasoning Capabilities into Smaller Language Models", Findings of ACL 2023.

A guided decomposer also reads a plan of the solution, its operators or its equations, and a planner learns to write
that plan: Shridhar, Macina, El-Assady, Sinha, Kapur and Sachan, "Automatic Generation of Socratic Subquestions for
Teaching Math Word Problems", EMNLP 2022. Methods without guidance never see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from trainer.errors import UserError


class Role(IntEnum):
    """What a segment of an example is. Stored as one byte."""

    PROBLEM = 0
    SUBQUESTION = 1
    SOLUTION = 2
    CALCULATOR = 3  # the result inside <<expression=result>>, which the calculator writes at inference
    DELIMITER = 4  # "####": the reasoning is over
    ANSWER = 5  # the final answer and the end-of-sequence token
    OPERATORS = 6  # guidance: the operators of the solution's calculator annotations
    EQUATIONS = 7  # guidance: the expressions of the solution's calculator annotations, without their results


@dataclass(frozen=True)
class View:
    """`reads`: roles in the sequence. `learns`: roles whose tokens carry loss. `needs`: roles a problem must have."""

    inputs: frozenset[Role]
    targets: frozenset[Role]
    required: frozenset[Role]


GUIDANCE = (Role.OPERATORS, Role.EQUATIONS)

_P, _Q, _S, _C, _D, _A, _O, _E = Role


def _view(reads: set[Role], learns: set[Role], needs: set[Role]) -> View:
    return View(frozenset(reads), frozenset(learns), frozenset(needs))


VIEWS = {
    "answer_only": _view({_P, _D, _A}, {_D, _A}, set()),
    "cot": _view({_P, _S, _C, _D, _A}, {_S, _D, _A}, {_S}),
    "socratic": _view({_P, _Q, _S, _C, _D, _A}, {_Q, _S, _D, _A}, {_Q, _S}),
    "decomposer": _view({_P, _Q, _D}, {_Q, _D}, {_Q}),
    "decomposer_interleaved": _view({_P, _Q, _S, _C, _D}, {_Q, _D}, {_Q, _S}),
    "solver": _view({_P, _Q, _S, _C, _D, _A}, {_S, _A}, {_Q, _S}),
    "planner_operators": _view({_P, _O}, {_O}, {_O}),
    "planner_equations": _view({_P, _E}, {_E}, {_E}),
    "decomposer_operators": _view({_P, _O, _Q, _D}, {_Q, _D}, {_O, _Q}),
    "decomposer_equations": _view({_P, _E, _Q, _D}, {_Q, _D}, {_E, _Q}),
    "decomposer_interleaved_operators": _view({_P, _O, _Q, _S, _C, _D}, {_Q, _D}, {_O, _Q, _S}),
    "decomposer_interleaved_equations": _view({_P, _E, _Q, _S, _C, _D}, {_Q, _D}, {_E, _Q, _S}),
}


def view_of(name: str, train_on_calculator_results: bool = False) -> View:
    """The view of that name. With `train_on_calculator_results` whoever learns solutions learns the results too.

    Raises UserError for an unknown name.
    """
    if name not in VIEWS:
        raise UserError(f"unknown method {name!r}; choose one of {', '.join(VIEWS)}")
    view = VIEWS[name]
    if train_on_calculator_results and Role.SOLUTION in view.targets:
        return View(view.inputs, view.targets | {Role.CALCULATOR}, view.required)
    return view


def guidance_of(name: str) -> Role | None:
    """The plan that a method of that name reads or, a planner, writes; None for methods without one."""
    return next((role for role in GUIDANCE if role in VIEWS[name].inputs), None)


def is_planner(name: str) -> bool:
    """Whether it writes a plan for a guided decomposer."""
    return bool(VIEWS[name].targets & set(GUIDANCE))


def is_decomposer(name: str) -> bool:
    """Whether it asks sub-questions and leaves their solutions to a solver."""
    return Role.SUBQUESTION in VIEWS[name].targets and Role.SOLUTION not in VIEWS[name].targets


def is_interleaved(name: str) -> bool:
    """Whether it is a decomposer that reads the solutions so far before it asks the next sub-question."""
    return is_decomposer(name) and Role.SOLUTION in VIEWS[name].inputs
