"""Pairs of methods on the same problems: the exact McNemar test over predictions.jsonl."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.report.evaluations import RULES, Evaluation
from trainer.report.statistics import holm, mcnemar
from trainer.report.summary import Panel


@dataclass(frozen=True)
class Comparison:
    """Two students of one size and seed; `refusal` says why they were not compared, else it is ""."""

    panel: str
    model_name: str
    num_parameters: int
    seed: int | None
    first: str  # method
    second: str
    n: int = 0
    both: int = 0
    only_first: int = 0
    only_second: int = 0
    neither: int = 0
    p: float | None = None
    p_holm: float | None = None  # adjusted over every comparison of the report
    refusal: str = ""


@dataclass(frozen=True)
class Answer:
    """What one prediction is compared by."""

    problem: tuple[str, str]  # question, gold answer
    correct: bool  # strict


def compare(panels: Sequence[Panel]) -> list[Comparison]:
    """All pairs of methods that share panel, model and training seed, with Holm's adjustment over all of them."""
    comparisons = []
    for panel in panels:
        for model in panel.models:
            cells = panel.of_model(model)
            answers = {e.directory.path: read_answers(e) for cell in cells for e in cell.evaluations}
            for first, second in itertools.combinations(cells, 2):
                for a, b in itertools.product(first.evaluations, second.evaluations):
                    if (a.train_seed, a.seed) == (b.train_seed, b.seed):
                        found = _compare_two(answers[a.directory.path], answers[b.directory.path])
                        names = (
                            panel.title,
                            a.model_name,
                            a.num_parameters,
                            a.train_seed,
                            a.method,
                            b.method,
                        )
                        comparisons.append(Comparison(*names, **found))
    tested = [index for index, comparison in enumerate(comparisons) if comparison.p is not None]
    adjusted = holm([p for p in (comparison.p for comparison in comparisons) if p is not None])
    for index, p_holm in zip(tested, adjusted, strict=True):
        comparisons[index] = replace(comparisons[index], p_holm=p_holm)
    return comparisons


def read_answers(evaluation: Evaluation) -> dict[str, Answer] | None:
    """id -> answer, or None if there is no predictions.jsonl.

    Raises UserError if the file is damaged, names an id twice, or does not give the counts of results.json.
    """
    path = evaluation.directory.predictions
    if not path.is_file():
        return None
    answers: dict[str, Answer] = {}
    correct = dict.fromkeys(RULES, 0)
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            record = _parse(path, number, line)
            if record["id"] in answers:
                raise UserError(f"{path}, line {number}: id {record['id']!r} occurs twice; evaluate again")
            answers[record["id"]] = Answer(
                (str(record.get("question")), str(record.get("gold"))), record["correct_strict"]
            )
            for rule in RULES:
                correct[rule] += record[f"correct_{rule}"]
    for rule in RULES:
        score = evaluation.accuracy[rule]
        if (correct[rule], len(answers)) != (score.correct, score.n):
            raise UserError(
                f"{path}: {correct[rule]} of {len(answers)} {rule} correct, but {evaluation.directory.results} says "
                f"{score.correct} of {score.n}; evaluate again"
            )
    return answers


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


def _compare_two(first: dict[str, Answer] | None, second: dict[str, Answer] | None) -> dict[str, Any]:
    if first is None or second is None:
        return {"refusal": "predictions missing"}
    only_in_first, only_in_second = len(first.keys() - second.keys()), len(second.keys() - first.keys())
    if only_in_first or only_in_second:
        return {
            "refusal": f"different problems: {only_in_first} only in the first, {only_in_second} only in the second"
        }
    changed = sum(first[name].problem != second[name].problem for name in first)
    if changed:
        return {"refusal": f"different problems: {changed} of the same id differ in question or answer"}
    table = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for name, answer in first.items():
        table[answer.correct, second[name].correct] += 1
    b, c = table[True, False], table[False, True]
    counts = {"both": table[True, True], "only_first": b, "only_second": c, "neither": table[False, False]}
    return {"n": len(first), **counts, "p": mcnemar(b, c)}
