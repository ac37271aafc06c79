"""Labels, order, colours and kinds of the methods."""

from __future__ import annotations

from typing import NamedTuple

PAIRS = (
    "iterative_ahead",
    "iterative_interleaved",
)  # a decomposer writes the sub-questions, a solver answers
WRITE_QUESTIONS = ("socratic", *PAIRS)  # the evaluated models write the sub-questions
WITH_QUESTIONS = (*WRITE_QUESTIONS, "gold_subquestions")  # sub-questions and solutions alternate in the text
GUIDED = "+"  # "iterative_ahead+operators": the decomposer was given the operators


class Method(NamedTuple):
    """`header` is the column of the comparison with the paper, "" without one; "" as a colour: a spare one is taken."""

    label: str
    header: str = ""
    color: str = ""
    dark: str = ""
    marker: str = ""


# In display order. The methods after gold_subquestions train one model of a pair, which is evaluated only in a pair.
METHODS = {
    "few_shot": Method("few-shot", "few-shot", "#3b3178", "#a9a0ee", "X"),
    "answer_only": Method("answer only", "answer only", "#767b82", "#a2a7ae", "o"),
    "cot": Method("CoT", "CoT", "#0072b2", "#5bb4ea", "s"),
    "socratic": Method("Socratic", "Socratic unified", "#d55e00", "#f28a3c", "D"),
    "iterative_ahead": Method("iterative, ahead", "Socratic iterative, ahead", "#009e73", "#3cc69d", "^"),
    "iterative_interleaved": Method(
        "iterative, interleaved", "Socratic iterative, interleaved", "#b8568f", "#e191bf", "v"
    ),
    "gold_subquestions": Method("gold sub-questions", "with gold sub-questions", "#8a6d00", "#d9b93a", "P"),
    "solver": Method("solver", "", "#44aa99", "#74d0c1", "p"),
    "decomposer": Method("decomposer", "", "#882255", "#d97ba6", ">"),
    "decomposer_operators": Method("decomposer operators"),
    "decomposer_equations": Method("decomposer equations"),
    "decomposer_interleaved": Method("decomposer interleaved", "", "#117733", "#5fbf7c", "<"),
    "decomposer_interleaved_operators": Method("decomposer interleaved operators"),
    "decomposer_interleaved_equations": Method("decomposer interleaved equations"),
    "planner_operators": Method("planner operators"),
    "planner_equations": Method("planner equations"),
}
_ORDER = list(METHODS)


def without_guidance(method: str) -> str:
    """Return the method without its guidance."""
    return method.partition(GUIDED)[0]


def canonical(method: str) -> str:
    """Return iterative_ahead+operators (as in evaluations) for iterative_ahead_operators (as in run names)."""
    pair = next((pair for pair in PAIRS if method.startswith(f"{pair}_")), "")
    return f"{pair}{GUIDED}{method.removeprefix(pair)[1:]}" if pair else method


def label(method: str) -> str:
    """Return `iterative, ahead + gold operators` for iterative_ahead+gold operators; an unknown name unchanged."""
    name, mark, guidance = method.partition(GUIDED)
    known = METHODS[name].label if name in METHODS else name
    return f"{known} + {guidance}" if mark else known


def method_rank(method: str) -> tuple[int, str]:
    """Return a sort key: known methods in their order, each before its guided variants, then others by name."""
    name = without_guidance(method)
    return (_ORDER.index(name) if name in METHODS else len(METHODS), method)


def is_role_of_pair(method: str) -> bool:
    """Return whether models of this method answer only as a role of a pair, so their runs are not evaluated."""
    return method.startswith(("decomposer", "planner_")) or method == "solver"
