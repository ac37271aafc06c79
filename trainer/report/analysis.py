"""What the report keeps of the predictions of one evaluation: they are read once, and most of the text is let go."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.report.causes import Finding, find_cause
from trainer.report.evaluations import Evaluation
from trainer.report.methods import ASK, base
from trainer.report.predictions import Prediction, read_predictions
from trainer.report.steps import Solution, parse
from trainer.report.subquestions import Quality, Scorer, score_questions


@dataclass(frozen=True)
class Answer:
    """What one prediction is compared by."""

    problem: bytes  # digest of question and gold answer
    correct: bool  # strict


@dataclass(frozen=True)
class Example:
    """A prediction that the page shows."""

    prediction: Prediction
    solution: Solution
    finding: Finding | None  # None: no gold steps to compare with


@dataclass(frozen=True)
class Analysis:
    """One evaluation's predictions. `causes` and `quality` are None where they cannot be told."""

    answers: dict[str, Answer] | None = None  # id -> answer; None: no predictions.jsonl
    causes: Counter[str] | None = None  # right and every cause, adding up to the problems
    quality: Quality | None = None  # of the sub-questions, if the student wrote them
    examples: list[Example] = field(default_factory=list)
    stopped: Counter[str] = field(default_factory=Counter)  # why pairs were cut
    without_gold_steps: bool = False


Analyses = dict[Path, Analysis]  # by evaluation directory


def analyse(
    evaluations: Sequence[Evaluation], max_examples: int = 0, scorer: Scorer | None = None
) -> Analyses:
    """Read all predictions. `max_examples` in all are kept to be shown, as many for each evaluation.

    The same problems are chosen in every evaluation of the same problems, by a digest of their ids: neither by
    their place nor by how they were answered. Raises UserError for predictions that are damaged.
    """
    quota = max_examples // len(evaluations) if evaluations else 0
    return {e.directory.path: _analyse_one(e, quota, scorer or Scorer()) for e in evaluations}


def _analyse_one(evaluation: Evaluation, quota: int, scorer: Scorer) -> Analysis:
    predictions = read_predictions(evaluation)
    if predictions is None:
        return Analysis()
    chosen = {p.id for p in sorted(predictions, key=lambda p: _digest(p.id))[:quota]}
    have_steps = all(p.gold_steps is not None for p in predictions)
    examples: list[Example] = []
    causes: Counter[str] = Counter()
    questions: list[tuple[list[str], list[str]]] = []
    for prediction in predictions:
        solution = parse(prediction.text, evaluation.mode)
        finding = None
        if have_steps:
            gold = prediction.gold_steps or ()
            finding = find_cause(
                solution, prediction.correct, bool(prediction.strict), evaluation.method, gold
            )
            causes[finding.cause] += 1
            questions.append(
                ([s.question for s in solution.steps if s.question], [s.question for s in gold if s.question])
            )
        if prediction.id in chosen:
            examples.append(Example(prediction, solution, finding))
    asks = base(evaluation.method) in ASK and have_steps
    return Analysis(
        answers={p.id: Answer(_digest(f"{p.question}\0{p.gold}"), p.correct) for p in predictions},
        causes=causes if have_steps else None,
        quality=score_questions(questions, scorer) if asks else None,
        examples=examples,
        stopped=Counter(p.stopped for p in predictions if p.stopped),
        without_gold_steps=not have_steps,
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
