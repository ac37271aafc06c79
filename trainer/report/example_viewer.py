"""Data of the page's example viewer: problems, students' answers, and where each leaves the gold solution."""

from __future__ import annotations

import json
from typing import Any

from trainer.report.columns import records
from trainer.report.error_types import LABELS
from trainer.report.methods import base, label
from trainer.report.report_data import ReportData
from trainer.report.solution_steps import StepText


def viewer_data(data: ReportData) -> dict[str, Any]:
    """Return the object that example_viewer.js reads.

    evaluations: [{problems, model, method, label, seed, calculator, given, shown, of}]
    problems: [{id, question, gold, steps or null}], each once
    predictions: [[evaluation, problem, steps, ending, correct, error type, first wrong step, tokens, stopped]]
    steps: [[sub-question, solution, [for each annotation, whether its result is the calculator's]]]
    causes: {error type: label}. Empty lists if no example is shown.
    """
    shown = data.predictions[data.predictions["is_shown"]]
    counts = shown.groupby("evaluation").size()
    evaluations = [
        {
            "problems": row["panel"],
            "model": row["model"],
            "method": row["method"],
            "label": label(row["method"]),
            "seed": row["train_seed"],
            "calculator": row["calculator"],
            "given": base(row["method"]) == "gold_subquestions",  # the sub-questions are not the student's
            "shown": int(counts[number]),
            "of": row["n"],
        }
        for number, row in zip(counts.index, records(data.evaluations.loc[counts.index]), strict=True)
    ]
    positions = {number: position for position, number in enumerate(counts.index)}
    problems: dict[tuple[str, str, str], dict[str, Any]] = {}
    numbers: dict[tuple[str, str, str], int] = {}
    predictions = []
    for row in records(shown):
        key = (row["id"], row["question"], row["gold"])
        steps = row["gold_steps"]
        problem = dict(zip(("id", "question", "gold"), key, strict=True))
        problems.setdefault(
            key, problem | {"steps": None if steps is None else [_step(step) for step in steps]}
        )
        predictions.append(
            [
                positions[row["evaluation"]],
                numbers.setdefault(key, len(numbers)),
                [_step(step) for step in row["solution"].steps],
                row["solution"].ending,
                int(row["correct"]),
                row["error_type"],
                row["wrong_step"],
                row["generated_tokens"],
                row["stopped"] or ("" if row["finished"] else "cut at its limit of tokens"),
            ]
        )
    return {
        "evaluations": evaluations,
        "problems": list(problems.values()),
        "predictions": predictions,
        "causes": LABELS,
    }


def embedded_json(data: dict[str, Any]) -> str:
    """Return ASCII JSON that cannot end the script element around it, whatever a student wrote."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _step(step: StepText) -> list[Any]:
    return [step.question, step.solution, [int(is_computed) for is_computed in step.computed]]
