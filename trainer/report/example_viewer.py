"""Data of the page's example viewer: problems, generated answers, and the first wrong step of each answer."""

from typing import Any

import pandas as pd

from trainer.report.columns import to_dicts
from trainer.report.error_types import LABELS
from trainer.report.format import stop_text
from trainer.report.methods import label, without_guidance
from trainer.report.solution_steps import SolutionStep


def viewer_data(evaluations: pd.DataFrame, predictions: pd.DataFrame) -> dict[str, Any]:
    """Return the object that example_viewer.js reads. It contains the predictions whose `is_shown` is true.

    evaluations: [{problems, model, method, label, seed, calculator, given, shown, of}]. In this list, `problems` is the
    title of the panel, `given` is true if the model reads gold sub-questions, `of` is the number of all predictions, and
    `shown` is the number of predictions on the page.
    problems: [{id, question, gold, steps}], each problem once. gold: the gold answer. steps: the gold steps, or null.
    predictions: [[evaluation index, problem index, steps, ending, correct, error type, wrong step, tokens, stopped]]
    steps: [[sub-question, solution, results]]. results: for each annotation, 1 if the calculator gives the same result, else 0.
    causes: {error type: label}.
    """
    shown = predictions[predictions["is_shown"]]
    counts = shown["evaluation"].value_counts(sort=False)
    rows = evaluations.loc[counts.index]
    rows = rows.assign(problems=rows["panel"], seed=rows["train_seed"], shown=counts, of=rows["n"])
    rows["label"] = rows["method"].map(label)
    rows["given"] = rows["method"].map(without_guidance) == "gold_subquestions"
    columns = ["problems", "model", "method", "label", "seed", "calculator", "given", "shown", "of"]

    problem = shown.groupby(["id", "problem"], sort=False).ngroup()
    unique = shown.loc[problem.drop_duplicates().index]
    problems = unique[["id", "question", "gold"]].assign(steps=unique["gold_steps"].map(_steps, "ignore"))
    stopped = shown["stopped"].mask((shown["stopped"] == "") & ~shown["finished"], "max_new_tokens")
    answers = pd.DataFrame(
        {
            "evaluation": shown.groupby("evaluation", sort=False).ngroup(),
            "problem": problem,
            "steps": [_steps(solution.steps) for solution in shown["solution"]],
            "ending": [solution.ending for solution in shown["solution"]],
            "correct": shown["correct"].astype(int),
            **shown[["error_type", "wrong_step", "generated_tokens"]],
            "stopped": [stop_text(reason) for reason in stopped],
        },
        dtype=object,  # texts may contain lone surrogates, which Arrow strings cannot store
    )
    return {
        "evaluations": to_dicts(rows[columns]),
        "problems": to_dicts(problems),
        "predictions": [list(answer.values()) for answer in to_dicts(answers)],
        "causes": LABELS,
    }


def _steps(steps: tuple[SolutionStep, ...]) -> list[list[Any]]:
    return [[step.question, step.solution, [int(is_right) for is_right in step.computed]] for step in steps]
