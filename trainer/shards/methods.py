"""Training methods as views of stored problems. A view lists the roles of all its segments and the roles with loss.

`decomposer_interleaved` and `solver` read the same sub-questions and solutions, and have disjoint loss masks. A problem of
n steps costs one forward pass, not n. The gradient is the same as that of n separate examples: attention is causal, so the
loss of step i depends only on the prefix that a separate example would have. The two methods are from Shridhar, Stolfo and
Sachan, "Distilling Reasoning Capabilities into Smaller Language Models", Findings of ACL 2023.

A guided decomposer also reads a plan: the operators or the equations of the solution. A planner learns to write this plan:
Shridhar, Macina, El-Assady, Sinha, Kapur and Sachan, "Automatic Generation of Socratic Subquestions for Teaching Math Word
Problems", EMNLP 2022. The views of all other methods leave the plan out.
"""

from dataclasses import dataclass
from enum import IntEnum

from trainer.errors import UserError


class SegmentRole(IntEnum):
    """Role of a segment of an example, stored as one byte."""

    PROBLEM = 0
    SUBQUESTION = 1
    SOLUTION = 2
    CALCULATOR = 3  # the result in <<expression=result>>; the calculator inserts it at inference
    DELIMITER = 4  # "####", the end of the reasoning
    ANSWER = 5  # the final answer and the end-of-sequence token
    OPERATORS = 6  # plan: the operators of the solution's calculator annotations
    EQUATIONS = 7  # plan: the expressions of the solution's calculator annotations, without results


@dataclass(frozen=True)
class View:
    """Roles of the segments that a training method uses."""

    inputs: frozenset[SegmentRole]  # roles in the sequence, targets included
    targets: frozenset[SegmentRole]  # roles with loss
    required: frozenset[SegmentRole]  # a problem that lacks one of these roles has no example


GUIDANCE = (SegmentRole.OPERATORS, SegmentRole.EQUATIONS)

_P, _Q, _S, _C, _D, _A, _O, _E = SegmentRole


def _view(inputs: set[SegmentRole], targets: set[SegmentRole], required: set[SegmentRole]) -> View:
    return View(frozenset(inputs), frozenset(targets), frozenset(required))


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
    """Return the view of method `name`. Raises UserError for an unknown name.

    `train_on_calculator_results`: if solutions are targets, calculator results are targets too.
    """
    if name not in VIEWS:
        raise UserError(f"unknown method {name!r}; choose one of {', '.join(VIEWS)}")
    view = VIEWS[name]
    if train_on_calculator_results and SegmentRole.SOLUTION in view.targets:
        return View(view.inputs, view.targets | {SegmentRole.CALCULATOR}, view.required)
    return view


def guidance_of(name: str) -> SegmentRole | None:
    """Return the role of the plan that method `name` reads or writes; None for methods without a plan."""
    return next((role for role in GUIDANCE if role in VIEWS[name].inputs), None)


def is_planner(name: str) -> bool:
    """Return whether method `name` writes a plan for a guided decomposer."""
    return bool(VIEWS[name].targets & set(GUIDANCE))


def is_decomposer(name: str) -> bool:
    """Return whether method `name` writes sub-questions but not their solutions."""
    return SegmentRole.SUBQUESTION in VIEWS[name].targets and SegmentRole.SOLUTION not in VIEWS[name].targets


def is_interleaved(name: str) -> bool:
    """Return whether method `name` is a decomposer that reads each solution before it writes the next sub-question."""
    return is_decomposer(name) and SegmentRole.SOLUTION in VIEWS[name].inputs
