"""Read and check single files: results.json, metrics.jsonl and predictions.jsonl.

Fractions and intervals are computed again from the counts; a file that contradicts itself raises UserError.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from trainer.errors import UserError
from trainer.report import columns
from trainer.report.format import clean
from trainer.report.methods import GUIDED, base
from trainer.report.solution_steps import StepText
from trainer.storage.run_directory import EvaluationDirectory, parse_run_name

RULES = ("strict", "flexible")
_ROLES = ("decomposer", "solver", "planner")
_ACCURACY_TOLERANCE = 1e-3  # results.json may round a fraction to three digits
_TEXTS = ("data", "split", "mode", "model_name", "train_data", "method")
_INTEGERS = ("seed", "num_parameters", "unfinished", "generated_tokens", "num_problems")
_TYPES: dict[str, type] = {
    **{name: str for name in _TEXTS},
    **{name: int for name in _INTEGERS},
    **{"calculator": bool, "temperature": float, "seconds": float, "accuracy": dict, "by_num_steps": dict},
}


def read_evaluation(directory: EvaluationDirectory, run: str) -> dict[str, Any]:
    """Return the evaluation columns of columns.RUNS for one results.json of the run of this name.

    Raises UserError naming the file and the value that is wrong.
    """
    path = directory.results
    record = read_json(path)
    if record.get("format") != 1:
        raise UserError(
            f"{path}: format is {record.get('format')!r}, expected 1; it was made by another version"
        )
    for name, kind in _TYPES.items():
        if kind is float and type(record.get(name)) is int:
            record[name] = float(record[name])
        _check_type(path, record, name, kind)
    if record.get("train_seed") is not None:
        _check_type(path, record, "train_seed", int)
    correct, by_num_steps = _counts(path, record)
    record |= {name: clean(record[name]) for name in _TEXTS}
    run_data, run_method, run_model, _ = parse_run_name(run)
    if record["mode"] == "few_shot" and not record["train_data"]:
        # A published model does not know its name in the study; it stands in the row of its students.
        record["model_name"] = clean(run_model) or record["model_name"]
    members = [_member(role, record[role], path) for role in _ROLES if record.get(role)]
    method = (record["method"] or record["mode"]) + _guidance(members, record)
    problems = _problems(clean(directory.path.name), run_method, record)
    train_data = run_data or record["train_data"]
    same_data = record["data"] in (train_data, record["train_data"]) or problems.startswith(f"{train_data}-")
    stopped_at = first_integer(record.get("step"), 0) if record.get("finished") is False else None
    remarks = (
        "" if same_data or not train_data else f"trained on {train_data}",
        "" if record["mode"] == base(method) else f"asked for {record['mode']}",
        "" if record["calculator"] else "no calculator",
        f"temperature {record['temperature']:g}" if record["temperature"] else "",
        "" if stopped_at is None else f"stopped at step {stopped_at}",
    )
    warnings = record.get("warnings")
    return {
        "evaluation_name": clean(directory.path.name),
        "results_path": path,
        "predictions_path": directory.predictions,
        "problems": problems,
        "remarks": remarks,
        **{name: record[name] for name in ("data", "split", "mode", "calculator", "temperature")},
        "method": method,
        "sampling_seed": record["seed"],
        "train_seed": record.get("train_seed"),
        "stopped_at": stopped_at,
        "evaluated_train_data": record["train_data"],
        "evaluated_model": record["model_name"],
        "evaluated_parameters": record["num_parameters"],
        "total_parameters": first_integer(record.get("total_parameters"), record["num_parameters"]),
        "n": record["num_problems"],
        **{f"{rule}_correct": correct[rule] for rule in RULES},
        "by_num_steps": by_num_steps,
        "unfinished_generations": record["unfinished"],
        "generated_tokens": record["generated_tokens"],
        "calculator_results_given": first_integer(record.get("calculator_results_given")),
        "evaluation_seconds": record["seconds"],
        "members": members,
        "backends": _backends(record.get("backends")),
        "warnings": [clean(str(warning)) for warning in warnings] if isinstance(warnings, list) else [],
    }


def _check_type(path: Path, record: dict[str, Any], name: str, kind: type) -> None:
    if type(record.get(name)) is not kind:
        raise UserError(f"{path}: {name} is {record.get(name)!r}, expected {kind.__name__}; evaluate again")


def _counts(path: Path, record: dict[str, Any]) -> tuple[dict[str, int], dict[int, tuple[int, int]]]:
    """Return correct answers by rule, and (strict correct, n) by number of steps, after checking that they add up."""
    whole = _scores(record["accuracy"], path, "accuracy")
    parts: dict[int, dict[str, tuple[int, int]]] = {}
    for key, scores in record["by_num_steps"].items():
        if not key.isdecimal():
            raise UserError(
                f"{path}: by_num_steps has the key {key!r}, expected a number of steps; evaluate again"
            )
        parts[int(key)] = _scores(scores, path, f"by_num_steps {key}")
    for rule, (correct, n) in whole.items():
        if n != record["num_problems"]:
            raise UserError(
                f"{path}: {rule} n is {n} but num_problems is {record['num_problems']}; evaluate again"
            )
        total = tuple(map(sum, zip(*(scores[rule] for scores in parts.values()), strict=True)))
        if parts and total != (correct, n):
            raise UserError(f"{path}: by_num_steps does not add up to {rule} {correct}/{n}; evaluate again")
    if not record["num_problems"]:
        raise UserError(f"{path}: no problem was evaluated; evaluate again on shards that hold some")
    correct_by_rule = {rule: correct for rule, (correct, _) in whole.items()}
    return correct_by_rule, {num: parts[num]["strict"] for num in sorted(parts)}


def _scores(record: Any, path: Path, where: str) -> dict[str, tuple[int, int]]:
    """Return (correct, n) by rule."""
    scores = {}
    for rule in RULES:
        entry = record.get(rule) if isinstance(record, dict) else None
        counts: dict[str, Any] = entry if isinstance(entry, dict) else {}
        correct, n, stated = (counts.get(name) for name in ("correct", "n", "accuracy"))
        if type(correct) is not int or type(n) is not int or not 0 <= correct <= n:
            raise UserError(f"{path}: {where} {rule} is {entry!r}, expected correct <= n; evaluate again")
        if n and isinstance(stated, (int, float)) and not abs(stated - correct / n) <= _ACCURACY_TOLERANCE:
            raise UserError(
                f"{path}: {where} {rule} says {stated} but {correct}/{n} = {correct / n:.4f}; evaluate again"
            )
        scores[rule] = (correct, n)
    return scores


def _problems(name: str, run_method: str, record: dict[str, Any]) -> str:
    """Return the name of the set of problems: a study may call a set of its own data by another name.

    The evaluation is called <data>-<split>-<mode>, where a guided pair has its run's method as the mode, followed by
    what differs from the usual.
    """
    usual = f"{record['data']}-{record['split']}"
    for mode in filter(None, (run_method, record["mode"])):
        found = re.fullmatch(f"(.+)-{re.escape(mode)}(?:-.*)?", name)
        if found and found[1] != usual:
            return found[1]
    return f"{record['data']} {record['split']}"


def _member(role: str, record: Any, path: Path) -> dict[str, Any]:
    """Return role, model_name and method of one of the models that answered together."""
    kinds = {"model_name": str, "method": str, "num_parameters": int}
    if not isinstance(record, dict) or any(
        type(record.get(name)) is not kind for name, kind in kinds.items()
    ):
        raise UserError(
            f"{path}: {role} is {record!r}, expected model_name, method, num_parameters; evaluate again"
        )
    return {"role": role, "model_name": clean(record["model_name"]), "method": clean(record["method"])}


def _backends(record: Any) -> list[dict[str, Any]]:
    """Return role, name, difference and reason of the generation backends; [] in results of older versions.

    difference: the largest one between its logits and those of the plain forward pass, in standard deviations of the
    logits (None: not checked). reason: why the default backend was not used.
    """
    found = []
    for role, choice in record.items() if isinstance(record, dict) else ():
        if isinstance(choice, dict) and choice.get("name"):
            name, difference = clean(str(choice["name"])), choice.get("difference")
            if choice.get("compared_with") == "generate":  # says nothing about the plain forward pass
                difference, name = None, f"{name} (as generate decodes)"
            number = float(difference) if isinstance(difference, (int, float)) else None
            reason = clean(str(choice.get("reason") or ""))
            found.append({"role": clean(str(role)), "name": name, "difference": number, "reason": reason})
    return found


def _guidance(members: list[dict[str, Any]], record: dict[str, Any]) -> str:
    """Return "+operators" for a decomposer guided by a planner's operators, "+gold operators" for gold ones, else ""."""
    method = next((member["method"] for member in members if member["role"] == "decomposer"), "")
    if not method.startswith("decomposer"):
        return ""
    guidance = method.removeprefix("decomposer").removeprefix("_interleaved").removeprefix("_")
    gold = "gold " if record.get("guidance_from") == "gold" else ""
    return f"{GUIDED}{gold}{guidance}" if guidance else ""


def read_metrics(path: Path) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return columns.METRICS of a training log, and the counts broken_metrics_lines and undone_steps.

    A missing file is an empty log. A step that is not after the last one is a resume at an earlier checkpoint and
    undoes that step and all later ones. Lines that are not JSON (cut by a kill) are left out and counted. Raises
    UserError if most lines are unreadable: then the file is something else.
    """
    text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    found = [record for record in map(_metrics_record, lines) if record is not None]
    broken = len(lines) - len(found)
    if broken > 1 and 2 * broken > len(lines):
        raise UserError(
            f"{path}: {broken} of {len(lines)} lines are not metrics (JSON with a step); restore the file"
        )
    metrics = columns.frame(found, columns.METRICS)
    steps = metrics["step"].where(~metrics["is_validation"])
    next_steps = steps[::-1].cummin().ffill()[::-1].shift(-1, fill_value=math.inf).fillna(math.inf)
    undone = metrics["step"] >= next_steps
    kept = metrics[~undone].drop_duplicates(["step", "is_validation"], keep="last")
    counts = {"broken_metrics_lines": broken, "undone_steps": int((undone & ~metrics["is_validation"]).sum())}
    return kept.sort_values("step", kind="stable", ignore_index=True), counts


def _metrics_record(line: str) -> dict[str, Any] | None:
    """Return one line of metrics.jsonl as columns.METRICS, None if it is not JSON with a step."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    validation = record.get("evaluation")
    is_validation = isinstance(validation, dict)
    values = {"loss": validation.get("loss")} if isinstance(validation, dict) else record
    numbers = {
        name: values.get(name) if type(values.get(name)) in (int, float) else np.nan
        for name in ("loss", "learned_tokens", "tokens_per_second", "seconds")
    }
    return {"step": record["step"], "is_validation": is_validation, **numbers}


def read_predictions(path: Path, expected: dict[str, int]) -> pd.DataFrame | None:
    """Return columns.PREDICTIONS of one evaluation, None if there is no predictions.jsonl.

    `expected`: n, strict_correct and flexible_correct of results.json. Raises UserError if the file is damaged, names
    an id twice, or has other counts.
    """
    if not path.is_file():
        return None
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    correct: Counter[str] = Counter()
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                rows.append(_prediction(record, f"{path}, line {number}"))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}); evaluate again") from None
            if record["id"] in seen:
                raise UserError(f"{path}, line {number}: id {record['id']!r} occurs twice; evaluate again")
            seen.add(record["id"])
            correct.update({rule: record[f"correct_{rule}"] for rule in RULES})
    for rule in RULES:
        stated = expected[f"{rule}_correct"], expected["n"]
        if (correct[rule], len(rows)) != stated:
            raise UserError(
                f"{path}: {correct[rule]} of {len(rows)} {rule} correct, but "
                f"{path.with_name('results.json')} says {stated[0]} of {stated[1]}; evaluate again"
            )
    return columns.frame(rows, columns.PREDICTIONS)


def _prediction(record: Any, where: str) -> dict[str, Any]:
    flags = [record.get(f"correct_{rule}") for rule in RULES] if isinstance(record, dict) else [None]
    if not all(type(flag) is bool for flag in flags) or type(record.get("id")) is not str:
        raise UserError(f"{where}: not a prediction (id, correct_strict, correct_flexible); evaluate again")
    steps, strict, tokens = (record.get(name) for name in ("gold_steps", "strict", "generated_tokens"))
    if steps is not None and not (isinstance(steps, list) and all(isinstance(step, dict) for step in steps)):
        raise UserError(f"{where}: gold_steps is not a list of steps; evaluate again")
    if steps is not None:
        steps = tuple(_gold_step(_text(step, "question"), _text(step, "solution")) for step in steps)
    return {
        **{name: _text(record, name) for name in ("id", "question", "gold", "text", "stopped")},
        "gold_steps": steps,
        "strict": strict if isinstance(strict, str) else None,
        "correct": record["correct_strict"],
        "generated_tokens": tokens if type(tokens) is int else 0,
        "finished": record.get("finished") is not False,
    }


# Every student of a data set has the same gold steps: their values are computed once.
_gold_step = functools.lru_cache(maxsize=1 << 15)(StepText)


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    return value if isinstance(value, str) else "" if value is None else str(value)


def first_integer(*candidates: Any) -> int | None:
    """Return the first candidate that is an int (and no bool), else None."""
    return next((value for value in candidates if type(value) is int), None)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file. Raises UserError if it cannot be read or holds something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it or make it again") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} holds a {type(record).__name__}, expected an object; make it again")
    return record
