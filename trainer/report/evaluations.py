"""Read results.json of one evaluation, and refuse one that contradicts itself.

Fractions and intervals are computed again from the counts: a report over wrong numbers is worse than none.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.report.format import clean
from trainer.report.methods import GUIDED
from trainer.report.statistics import wilson_interval
from trainer.storage.run_directory import EvaluationDirectory, parse_run_name

RULES = ("strict", "flexible")
_ROLES = ("decomposer", "solver", "planner")
_ACCURACY_TOLERANCE = 1e-3  # results.json may round a fraction to three digits


@dataclass(frozen=True)
class Score:
    """Correct answers out of n problems under one extraction rule."""

    correct: int
    n: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval."""
        return wilson_interval(self.correct, self.n)


@dataclass(frozen=True)
class Member:
    """One of the models that answered together."""

    role: str  # decomposer, solver or planner
    model_name: str
    method: str
    num_parameters: int


@dataclass(frozen=True)
class Backend:
    """The backend that decoded the model of a role.

    difference: the largest one between its logits and those of the plain forward pass, in standard deviations of the
    logits, as the check before the first answer found it (None: not checked). reason: why not in slots.
    """

    role: str
    name: str
    difference: float | None
    reason: str


@dataclass(frozen=True)
class Evaluation:
    """One results.json: one student on one set of problems."""

    directory: EvaluationDirectory
    run: str
    study: str
    data: str
    split: str
    mode: str  # how the student was asked to answer
    calculator: bool
    temperature: float
    seed: int  # of sampling
    method: str  # how the student was trained; of a pair, the mode and what guided its decomposer
    model_name: str
    train_seed: int | None
    num_parameters: int  # of a pair, the solver's
    total_parameters: int  # of all models that were used
    members: tuple[Member, ...]  # of a pair; () for a single model
    train_data: str
    stopped_at: int | None  # step, if the student's training was not finished
    accuracy: dict[str, Score]  # rule -> score
    by_num_steps: dict[int, dict[str, Score]]  # number of steps of the gold solution -> rule -> score
    unfinished: int  # generations cut at max_new_tokens
    generated_tokens: int
    seconds: float
    calculator_results_given: int | None  # annotations that the calculator filled
    warnings: tuple[str, ...]
    backends: tuple[Backend, ...]  # () in results of older versions

    @property
    def problems(self) -> str:
        """What it was evaluated on, in words: a study may call a set of its own data by another name."""
        name = clean(self.directory.path.name)
        # <data>-<split>-<mode>, where a guided pair has the name of its run's method, and then how it was asked.
        for mode in filter(None, (parse_run_name(self.run)[1], self.mode)):
            found = re.fullmatch(f"(.+)-{re.escape(mode)}(?:-.*)?", name)
            if found and found[1] != f"{self.data}-{self.split}":
                return found[1]
        return f"{self.data} {self.split}"

    @property
    def trained_elsewhere(self) -> str:
        """Name of the training data if it is not the data of the evaluation, else ""."""
        name = parse_run_name(self.run)[0] or self.train_data
        same = self.data in (name, self.train_data) or self.problems.startswith(f"{name}-")
        return "" if same else name


def load_evaluation(directory: EvaluationDirectory, run: str, study: str) -> Evaluation:
    """Read and check one evaluation. Raises UserError naming the file and the value that is wrong."""
    path = directory.results
    record = read_json(path)
    if record.get("format") != 1:
        raise UserError(
            f"{path}: format is {record.get('format')!r}, expected 1; it was made by another version"
        )

    def field(name: str, kind: type) -> Any:
        value = record.get(name)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"{path}: {name} is {value!r}, expected {kind.__name__}; evaluate again")
        return value

    accuracy = _scores(field("accuracy", dict), path, "accuracy")
    by_num_steps = {}
    for key, scores in field("by_num_steps", dict).items():
        if not key.isdecimal():
            raise UserError(
                f"{path}: by_num_steps has the key {key!r}, expected a number of steps; evaluate again"
            )
        by_num_steps[int(key)] = _scores(scores, path, f"by_num_steps {key}")
    for rule in RULES:
        whole_set = accuracy[rule]
        if whole_set.n != field("num_problems", int):
            raise UserError(
                f"{path}: {rule} n is {whole_set.n} but num_problems is {record['num_problems']}; evaluate again"
            )
        parts = [scores[rule] for scores in by_num_steps.values()]
        if parts and (sum(s.correct for s in parts), sum(s.n for s in parts)) != (
            whole_set.correct,
            whole_set.n,
        ):
            raise UserError(
                f"{path}: by_num_steps does not add up to {rule} {whole_set.correct}/{whole_set.n}; evaluate again"
            )
    if not accuracy["strict"].n:
        raise UserError(f"{path}: no problem was evaluated; evaluate again on shards that hold some")
    texts: dict[str, Any] = {
        name: clean(field(name, str)) for name in ("data", "split", "mode", "model_name", "train_data")
    }
    counts = ("seed", "num_parameters", "unfinished", "generated_tokens")
    numbers = {name: field(name, int) for name in counts}
    if texts["mode"] == "few_shot" and not texts["train_data"]:
        # A published model does not know what the study calls it; then it stands in the row of its students.
        texts["model_name"] = clean(parse_run_name(run)[2]) or texts["model_name"]
    members = tuple(_member(role, record[role], path) for role in _ROLES if record.get(role))
    total = whole(record.get("total_parameters"), numbers["num_parameters"])
    warnings = record.get("warnings")
    return Evaluation(
        directory=directory,
        run=run,
        study=study,
        # "": a model of unknown making
        method=(clean(field("method", str)) or texts["mode"]) + _guidance(members, record),
        members=members,
        total_parameters=total or 0,
        calculator_results_given=whole(record.get("calculator_results_given")),
        train_seed=None if record.get("train_seed") is None else field("train_seed", int),
        stopped_at=whole(record.get("step"), 0) if record.get("finished") is False else None,
        warnings=tuple(clean(str(warning)) for warning in warnings) if isinstance(warnings, list) else (),
        backends=_backends(record.get("backends")),
        calculator=field("calculator", bool),
        temperature=field("temperature", float),
        seconds=field("seconds", float),
        accuracy=accuracy,
        by_num_steps=dict(sorted(by_num_steps.items())),
        **texts,
        **numbers,
    )


def _member(role: str, record: Any, path: Path) -> Member:
    texts = [record.get(name) for name in ("model_name", "method")] if isinstance(record, dict) else []
    size = record.get("num_parameters") if texts else None
    if not texts or not all(isinstance(text, str) for text in texts) or type(size) is not int:
        raise UserError(
            f"{path}: {role} is {record!r}, expected model_name, method, num_parameters; evaluate again"
        )
    return Member(role, clean(str(texts[0])), clean(str(texts[1])), size)


def _backends(record: Any) -> tuple[Backend, ...]:
    found = []
    for role, choice in record.items() if isinstance(record, dict) else ():
        if isinstance(choice, dict) and choice.get("name"):
            difference: Any = choice.get("difference")
            name = clean(str(choice["name"]))
            if choice.get("compared_with") == "generate":  # no statement about the plain forward pass
                difference, name = None, f"{name} (as generate decodes)"
            found.append(
                Backend(
                    clean(str(role)),
                    name,
                    float(difference) if type(difference) in (int, float) else None,
                    clean(str(choice.get("reason") or "")),
                )
            )
    return tuple(found)


def _guidance(members: tuple[Member, ...], record: dict[str, Any]) -> str:
    """`+operators` for a decomposer that is told the operators a planner expects, `+gold operators` for gold ones."""
    methods = [member.method for member in members if member.role == "decomposer"]
    if not methods or not methods[0].startswith("decomposer"):
        return ""
    guidance = methods[0].removeprefix("decomposer").removeprefix("_interleaved").removeprefix("_")
    gold = "gold " if record.get("guidance_from") == "gold" else ""
    return f"{GUIDED}{gold}{guidance}" if guidance else ""


def _scores(record: Any, path: Path, where: str) -> dict[str, Score]:
    scores = {}
    for rule in RULES:
        entry = record.get(rule) if isinstance(record, dict) else None
        correct, n = (entry.get("correct"), entry.get("n")) if isinstance(entry, dict) else (None, None)
        if type(correct) is not int or type(n) is not int or not 0 <= correct <= n:
            raise UserError(f"{path}: {where} {rule} is {entry!r}, expected correct <= n; evaluate again")
        score = Score(correct, n)
        stated = entry.get("accuracy") if isinstance(entry, dict) else None
        if n and isinstance(stated, (int, float)) and not abs(stated - score.accuracy) <= _ACCURACY_TOLERANCE:
            raise UserError(
                f"{path}: {where} {rule} says {stated} but {correct}/{n} = {score.accuracy:.4f}; evaluate again"
            )
        scores[rule] = score
    return scores


def whole(*candidates: Any) -> int | None:
    return next((value for value in candidates if type(value) is int), None)


def read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it or make it again") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} holds a {type(record).__name__}, expected an object; make it again")
    return record
