"""Read predictions.jsonl of one evaluation, and refuse one that is damaged or contradicts results.json."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.report.evaluations import RULES, Evaluation
from trainer.report.steps import StepText


@dataclass(frozen=True)
class Prediction:
    """One line of predictions.jsonl. `correct` is under the strict rule; `gold_steps` is None in files of versions
    that did not keep them."""

    id: str
    question: str
    gold: str
    gold_steps: tuple[StepText, ...] | None
    text: str
    strict: str | None
    correct: bool
    generated_tokens: int
    finished: bool
    stopped: str  # why a pair was cut, "" if it was not

    @property
    def num_steps(self) -> int:
        return len(self.gold_steps or ())


def read_predictions(evaluation: Evaluation) -> list[Prediction] | None:
    """All predictions in the order of the file, or None if there is no predictions.jsonl.

    Raises UserError if the file is damaged, names an id twice, or does not give the counts of results.json.
    """
    path = evaluation.directory.predictions
    if not path.is_file():
        return None
    predictions: list[Prediction] = []
    seen: set[str] = set()
    correct = dict.fromkeys(RULES, 0)
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            record = _parse(path, number, line)
            if record["id"] in seen:
                raise UserError(f"{path}, line {number}: id {record['id']!r} occurs twice; evaluate again")
            seen.add(record["id"])
            predictions.append(_prediction(record, path, number))
            for rule in RULES:
                correct[rule] += record[f"correct_{rule}"]
    for rule in RULES:
        score = evaluation.accuracy[rule]
        if (correct[rule], len(predictions)) != (score.correct, score.n):
            raise UserError(
                f"{path}: {correct[rule]} of {len(predictions)} {rule} correct, but "
                f"{evaluation.directory.results} says {score.correct} of {score.n}; evaluate again"
            )
    return predictions


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error}); evaluate again") from None
    flags = [record.get(f"correct_{rule}") for rule in RULES] if isinstance(record, dict) else []
    if not flags or type(record.get("id")) is not str or not all(type(flag) is bool for flag in flags):
        raise UserError(
            f"{path}, line {number}: not a prediction (id, correct_strict, correct_flexible); evaluate again"
        )
    return record


def _prediction(record: dict[str, Any], path: Path, number: int) -> Prediction:
    steps = record.get("gold_steps")
    if steps is not None and not (isinstance(steps, list) and all(isinstance(step, dict) for step in steps)):
        raise UserError(f"{path}, line {number}: gold_steps is not a list of steps; evaluate again")
    strict, tokens = record.get("strict"), record.get("generated_tokens")
    return Prediction(
        id=record["id"],
        question=_text(record, "question"),
        gold=_text(record, "gold"),
        gold_steps=None
        if steps is None
        else tuple(_gold_step(_text(s, "question"), _text(s, "solution")) for s in steps),
        text=_text(record, "text"),
        strict=strict if isinstance(strict, str) else None,
        correct=record["correct_strict"],
        generated_tokens=tokens if type(tokens) is int else 0,
        finished=record.get("finished") is not False,
        stopped=_text(record, "stopped"),
    )


@functools.lru_cache(maxsize=1 << 15)
def _gold_step(question: str, solution: str) -> StepText:
    """Every student of a data set has the same gold steps: their values are worked out once."""
    return StepText(question, solution)


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    return value if isinstance(value, str) else "" if value is None else str(value)
