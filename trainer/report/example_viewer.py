"""Data of the page's example viewer: problems, answers, and the first step of each that differs from gold."""

from __future__ import annotations

import json
from typing import Any

from trainer.report.columns import records
from trainer.report.error_types import LABELS
from trainer.report.methods import label, without_guidance
from trainer.report.report_data import ReportData
from trainer.report.solution_steps import StepText

_PROBLEM = ["id", "question", "gold"]


def viewer_data(data: ReportData) -> dict[str, Any]:
    """Return the object that example_viewer.js reads.

    evaluations: [{problems, model, method, label, seed, calculator, given, shown, of}]
    problems: [{id, question, gold, steps or null}], each once
    predictions: [[evaluation, problem, steps, ending, correct, error type, first wrong step, tokens, stopped]]
    steps: [[sub-question, solution, [for each annotation, whether its result is the calculator's]]]
    causes: {error type: label}. Empty lists if no example is shown.
    """
    shown = data.predictions[data.predictions["is_shown"]]
    counts = shown["evaluation"].value_counts(sort=False)
    keys = list(zip(shown["id"], shown["problem"], strict=True))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    shown = shown.assign(
        problem=[numbers[key] for key in keys],
        evaluation=shown.groupby("evaluation", sort=False).ngroup(),
    )
    evaluations = [
        {
            "problems": row["panel"],
            "model": row["model"],
            "method": row["method"],
            "label": label(row["method"]),
            "seed": row["train_seed"],
            "calculator": row["calculator"],
            "given": without_guidance(row["method"])
            == "gold_subquestions",  # the model did not write the sub-questions
            "shown": int(counts[number]),
            "of": row["n"],
        }
        for number, row in zip(counts.index, records(data.evaluations.loc[counts.index]), strict=True)
    ]
    problems = [
        {**{name: row[name] for name in _PROBLEM}, "steps": row["gold_steps"] and _steps(row["gold_steps"])}
        for row in records(shown.drop_duplicates("problem"))
    ]
    predictions = [
        [
            row["evaluation"],
            row["problem"],
            _steps(row["solution"].steps),
            row["solution"].ending,
            int(row["correct"]),
            row["error_type"],
            row["wrong_step"],
            row["generated_tokens"],
            row["stopped"] or ("" if row["finished"] else "cut at its limit of tokens"),
        ]
        for row in records(shown)
    ]
    return {"evaluations": evaluations, "problems": problems, "predictions": predictions, "causes": LABELS}


def embedded_json(data: dict[str, Any]) -> str:
    """Return ASCII JSON without `<`, `>` and `&`, so that no text of a model can end the script element around it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _steps(steps: tuple[StepText, ...]) -> list[list[Any]]:
    return [[step.question, step.solution, [int(found) for found in step.computed]] for step in steps]
