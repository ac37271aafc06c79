"""The data of the page's example browser: problems, what students wrote, and where each left the gold solution."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from trainer.report.analysis import Analyses, Example
from trainer.report.causes import LABELS
from trainer.report.evaluations import Evaluation
from trainer.report.methods import base, label
from trainer.report.steps import StepText
from trainer.report.summary import Panel


def browser_data(panels: Sequence[Panel], analyses: Analyses) -> dict[str, Any]:
    """What browser.js reads.

    evaluations: [{problems, model, method, label, seed, calculator, given, shown, of}]
    problems: [{id, question, gold, steps or null}], each once
    predictions: [[evaluation, problem, steps, ending, correct, cause, first wrong step, tokens, stopped]]
    steps: [[sub-question, solution, [for each annotation, whether its result is the calculator's]]]
    causes: {cause: label}. Empty lists where nothing is to be shown.
    """
    evaluations: list[dict[str, Any]] = []
    problems: list[dict[str, Any]] = []
    predictions: list[list[Any]] = []
    places: dict[tuple[str, str, str], int] = {}
    for panel in panels:
        for evaluation in panel.evaluations:
            examples = analyses[evaluation.directory.path].examples
            if not examples:
                continue
            for example in examples:
                key = (example.prediction.id, example.prediction.question, example.prediction.gold)
                if key not in places:
                    places[key] = len(problems)
                    problems.append(_problem(example))
                predictions.append([len(evaluations), places[key], *_prediction(example)])
            evaluations.append(_evaluation(panel, evaluation, len(examples)))
    return {"evaluations": evaluations, "problems": problems, "predictions": predictions, "causes": LABELS}


def embedded(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in, whatever a student wrote; ASCII alone."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _evaluation(panel: Panel, evaluation: Evaluation, shown: int) -> dict[str, Any]:
    return {
        "problems": panel.title,
        "model": evaluation.model_name,
        "method": evaluation.method,
        "label": label(evaluation.method),
        "seed": evaluation.train_seed,
        "calculator": evaluation.calculator,
        "given": base(evaluation.method) == "gold_subquestions",  # the sub-questions are not the student's
        "shown": shown,
        "of": evaluation.accuracy["strict"].n,
    }


def _problem(example: Example) -> dict[str, Any]:
    prediction = example.prediction
    steps = prediction.gold_steps
    return {
        "id": prediction.id,
        "question": prediction.question,
        "gold": prediction.gold,
        "steps": None if steps is None else [_step(step) for step in steps],
    }


def _prediction(example: Example) -> list[Any]:
    prediction, finding = example.prediction, example.finding
    return [
        [_step(step) for step in example.solution.steps],
        example.solution.ending,
        int(prediction.correct),
        finding.cause if finding else None,
        finding.step if finding else None,
        prediction.generated_tokens,
        prediction.stopped or ("" if prediction.finished else "cut at its limit of tokens"),
    ]


def _step(step: StepText) -> list[Any]:
    return [step.question, step.solution, [int(is_computed) for is_computed in step.computed]]
