"""Names, explanations, display order and colours of the methods, and groups of methods."""

from typing import NamedTuple

# In these methods, a decomposer writes the sub-questions, and a solver solves them.
PAIR_METHODS = ("iterative_ahead", "iterative_interleaved")
WRITE_QUESTIONS = ("socratic", *PAIR_METHODS)  # methods whose models write the sub-questions
WITH_QUESTIONS = (*WRITE_QUESTIONS, "gold_subquestions")  # methods whose texts contain sub-questions
_GOLD = "gold "  # precedes the kind of a plan that is the data's and not a model's
GUIDED = "+"  # separates a pair method from the plan that the decomposer reads: "iterative_ahead+operators"


class DisplayedMethod(NamedTuple):
    """Display of a method in the report: an explanation in a few words, colours for light and dark mode, and a marker.

    A method without a colour gets a spare colour. `marker`: a Matplotlib marker.
    """

    explanation: str
    color: str = ""
    dark: str = ""
    marker: str = ""


_PLANNER = "model of a guided pair: writes a plan of the solution"
_GUIDED_DECOMPOSER = "model of a guided pair: reads a plan and writes sub-questions"
_GUIDED = (
    "decomposer_operators",
    "decomposer_equations",
    "decomposer_interleaved_operators",
    "decomposer_interleaved_equations",
)
# In display order. A run of a method after gold_subquestions only trains a model. Runs of other methods evaluate this model.
DISPLAYED_METHODS = {name: DisplayedMethod(*display) for name, display in {
    "few_shot": ("an untrained model reads solved problems first", "#3b3178", "#a9a0ee", "X"),
    "answer_only": ("writes the answer alone", "#767b82", "#a2a7ae", "o"),
    "cot": ("writes the solution of each step, then the answer", "#0072b2", "#5bb4ea", "s"),
    "socratic": ("writes a sub-question before the solution of each step", "#d55e00", "#f28a3c", "D"),
    "iterative_ahead": ("two models: a decomposer writes all sub-questions, then a solver solves them", "#009e73", "#3cc69d", "^"),
    "iterative_interleaved": ("two models alternate: a decomposer writes a sub-question, a solver solves it", "#b8568f", "#e191bf", "v"),
    "gold_subquestions": ("a solver solves the sub-questions of the data set", "#8a6d00", "#d9b93a", "P"),
    "solver": ("model of a pair: solves sub-questions", "#2f8f80", "#74d0c1", "p"),
    "decomposer": ("model of a pair: writes all sub-questions at once", "#882255", "#d97ba6", ">"),
    "decomposer_interleaved": ("model of a pair: writes one sub-question after another", "#117733", "#5fbf7c", "<"),
    **dict.fromkeys(_GUIDED, (_GUIDED_DECOMPOSER,)),
    **dict.fromkeys(("planner_operators", "planner_equations"), (_PLANNER,)),
}.items()}  # fmt: skip


def without_guidance(method: str) -> str:
    """Return the method without its guidance, e.g. iterative_ahead for iterative_ahead+operators."""
    return method.partition(GUIDED)[0]


def canonical(method: str) -> str:
    """Return a method's name in evaluations, e.g. iterative_ahead+operators for iterative_ahead_operators."""
    pair = next((pair for pair in PAIR_METHODS if method.startswith(f"{pair}_")), "")
    return f"{pair}{GUIDED}{method.removeprefix(pair)[1:]}" if pair else method


def label(method: str) -> str:
    """Return the only name of a method in the report: as in study files, e.g. iterative_ahead_operators."""
    name, mark, guidance = method.partition(GUIDED)
    plan = guidance.removeprefix(_GOLD)
    return f"{name}_{plan}{' (gold plan)' if plan != guidance else ''}" if mark else name


def explanation(method: str) -> str:
    """Return the explanation of a method in a few words; "" for an unknown method."""
    name, mark, _ = method.partition(GUIDED)
    known = DISPLAYED_METHODS[name].explanation if name in DISPLAYED_METHODS else ""
    return f"{known}; the decomposer also reads a plan" if known and mark else known


def method_order(method: str) -> tuple[int, str]:
    """Return a sort key: known methods in display order, each before its guided variants, then other methods by name."""
    names = [*DISPLAYED_METHODS, name := without_guidance(method)]
    return (names.index(name), method)


def is_role_of_pair(method: str) -> bool:
    """Return whether runs of this method only train a model. Runs of other methods evaluate the model."""
    return method.startswith(("decomposer", "planner_")) or method == "solver"
