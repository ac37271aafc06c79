"""Labels, order and kinds of the methods."""

from __future__ import annotations

# From least to most help. Those after gold_subquestions only train: they answer as a part of another method.
METHOD_ORDER = (
    *("few_shot", "answer_only", "cot", "socratic"),
    *("iterative_ahead", "iterative_interleaved", "gold_subquestions"),
    *("solver", "decomposer", "decomposer_operators", "decomposer_equations"),
    *("decomposer_interleaved", "decomposer_interleaved_operators", "decomposer_interleaved_equations"),
    *("planner_operators", "planner_equations"),
)
_LABELS = {
    "few_shot": "few-shot",
    "answer_only": "answer only",
    "cot": "CoT",
    "socratic": "Socratic",
    "iterative_ahead": "iterative, ahead",
    "iterative_interleaved": "iterative, interleaved",
    "gold_subquestions": "gold sub-questions",
}
PAIRS = ("iterative_ahead", "iterative_interleaved")  # a decomposer asks, a solver answers
ASK = ("socratic", *PAIRS)  # the student writes the sub-questions
WITH_QUESTIONS = (*ASK, "gold_subquestions")  # sub-questions and solutions alternate in the text
GUIDED = "+"  # "iterative_ahead+operators": the decomposer was given the operators


def base(method: str) -> str:
    """Return the method without its guidance."""
    return method.partition(GUIDED)[0]


def canonical(method: str) -> str:
    """Return iterative_ahead+operators (as in evaluations) for iterative_ahead_operators (as in run names)."""
    pair = next((pair for pair in PAIRS if method.startswith(f"{pair}_")), "")
    return f"{pair}{GUIDED}{method.removeprefix(pair)[1:]}" if pair else method


def label(method: str) -> str:
    """Return `iterative, ahead + gold operators` for iterative_ahead+gold operators; an unknown name as it is."""
    name, mark, guidance = method.partition(GUIDED)
    known = _LABELS.get(name, name.replace("_", " ") if name in METHOD_ORDER else name)
    return f"{known} + {guidance}" if mark else known


def method_rank(method: str) -> tuple[int, str]:
    """Return a sort key: known methods in their order, each before itself with guidance, then others by name."""
    name = base(method)
    return (METHOD_ORDER.index(name) if name in METHOD_ORDER else len(METHOD_ORDER), method)


def is_part(method: str) -> bool:
    """Return whether a run of this method has no answers of its own because it is a part of a pair."""
    return method.startswith(("decomposer", "planner_")) or method == "solver"
