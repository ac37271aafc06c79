"""Labels, display order and colours of the methods, and groups of methods."""

from typing import NamedTuple

# In these methods, a decomposer writes the sub-questions, and a solver solves them.
PAIR_METHODS = ("iterative_ahead", "iterative_interleaved")
WRITE_QUESTIONS = ("socratic", *PAIR_METHODS)  # methods whose models write the sub-questions
WITH_QUESTIONS = (*WRITE_QUESTIONS, "gold_subquestions")  # methods whose texts contain sub-questions
GUIDED = "+"  # separates a pair method from the plan that the decomposer reads: "iterative_ahead+operators"


class DisplayedMethod(NamedTuple):
    """Display of a method in the report.

    `header`: title of the method's column in the comparison with the paper; "" if there is no such column. `color` is for
    light mode, `dark` for dark mode. A method without a colour gets a spare colour. `marker`: a Matplotlib marker.
    """

    label: str
    header: str = ""
    color: str = ""
    dark: str = ""
    marker: str = ""


# In display order. A run of a method after gold_subquestions only trains a model. Runs of other methods evaluate this model.
DISPLAYED_METHODS = {
    "few_shot": DisplayedMethod("few-shot", "few-shot", "#3b3178", "#a9a0ee", "X"),
    "answer_only": DisplayedMethod("answer only", "answer only", "#767b82", "#a2a7ae", "o"),
    "cot": DisplayedMethod("CoT", "CoT", "#0072b2", "#5bb4ea", "s"),
    "socratic": DisplayedMethod("Socratic", "Socratic unified", "#d55e00", "#f28a3c", "D"),
    "iterative_ahead": DisplayedMethod(
        "iterative, ahead", "Socratic iterative, ahead", "#009e73", "#3cc69d", "^"
    ),
    "iterative_interleaved": DisplayedMethod(
        "iterative, interleaved", "Socratic iterative, interleaved", "#b8568f", "#e191bf", "v"
    ),
    "gold_subquestions": DisplayedMethod(
        "gold sub-questions", "with gold sub-questions", "#8a6d00", "#d9b93a", "P"
    ),
    "solver": DisplayedMethod("solver", "", "#44aa99", "#74d0c1", "p"),
    "decomposer": DisplayedMethod("decomposer", "", "#882255", "#d97ba6", ">"),
    "decomposer_operators": DisplayedMethod("decomposer operators"),
    "decomposer_equations": DisplayedMethod("decomposer equations"),
    "decomposer_interleaved": DisplayedMethod("decomposer interleaved", "", "#117733", "#5fbf7c", "<"),
    "decomposer_interleaved_operators": DisplayedMethod("decomposer interleaved operators"),
    "decomposer_interleaved_equations": DisplayedMethod("decomposer interleaved equations"),
    "planner_operators": DisplayedMethod("planner operators"),
    "planner_equations": DisplayedMethod("planner equations"),
}


def without_guidance(method: str) -> str:
    """Return the method without its guidance, e.g. iterative_ahead for iterative_ahead+operators."""
    return method.partition(GUIDED)[0]


def canonical(method: str) -> str:
    """Return a method's name in evaluations, e.g. iterative_ahead+operators for iterative_ahead_operators."""
    pair = next((pair for pair in PAIR_METHODS if method.startswith(f"{pair}_")), "")
    return f"{pair}{GUIDED}{method.removeprefix(pair)[1:]}" if pair else method


def label(method: str) -> str:
    """Return the method's label, e.g. `iterative, ahead + operators`. An unknown method is labelled with its name."""
    name, mark, guidance = method.partition(GUIDED)
    known = DISPLAYED_METHODS[name].label if name in DISPLAYED_METHODS else name
    return f"{known} + {guidance}" if mark else known


def method_order(method: str) -> tuple[int, str]:
    """Return a sort key: known methods in display order, each before its guided variants, then other methods by name."""
    names = [*DISPLAYED_METHODS, name := without_guidance(method)]
    return (names.index(name), method)


def is_role_of_pair(method: str) -> bool:
    """Return whether runs of this method only train a model. Runs of other methods evaluate the model."""
    return method.startswith(("decomposer", "planner_")) or method == "solver"
