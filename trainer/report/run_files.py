"""Read and check single files: results.json, metrics.jsonl and predictions.jsonl.

Fractions and intervals are computed again from the counts; a file that contradicts itself raises UserError.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from trainer.errors import UserError
from trainer.report import columns
from trainer.report.format import clean
from trainer.report.methods import GUIDED, without_guidance
from trainer.report.solution_steps import StepText
from trainer.storage.json_lines import read_json_lines
from trainer.storage.run_directory import EvaluationDirectory, parse_run_name

RULES = ("strict", "flexible")
_ROLES = ("decomposer", "solver", "planner")
_ACCURACY_TOLERANCE = 1e-3  # results.json may round a fraction to three digits
_TEXTS = ("data", "split", "mode", "model_name", "train_data", "method")
_INTEGERS = ("seed", "num_parameters", "unfinished", "generated_tokens", "num_problems")
_TYPES: dict[str, type] = {
    **dict.fromkeys(_TEXTS, str),
    **dict.fromkeys(_INTEGERS, int),
    **{"calculator": bool, "temperature": float, "seconds": float, "accuracy": dict, "by_num_steps": dict},
}
_ROLE_TYPES = {"model_name": str, "method": str, "num_parameters": int}


def read_evaluation(directory: EvaluationDirectory, run: str) -> dict[str, Any]:
    """Return the evaluation columns of columns.RUNS for one results.json of the run with this name.

    Raises UserError with the path of the file and the wrong value.
    """
    path = directory.results
    record = read_json(path)
    if record.get("format") != 1:
        raise UserError(
            f"{path}: format is {record.get('format')!r}, expected 1; it was made by another version"
        )
    types = _TYPES | ({"train_seed": int} if record.get("train_seed") is not None else {})
    for name, kind in types.items():
        if kind is float and type(record.get(name)) is int:
            record[name] = float(record[name])
        if type(record.get(name)) is not kind:
            raise UserError(
                f"{path}: {name} is {record.get(name)!r}, expected {kind.__name__}; evaluate again"
            )
    counts = _counts(path, record)
    record |= {name: clean(record[name]) for name in _TEXTS}
    run_data, run_method, run_model, _ = parse_run_name(run)
    if record["mode"] == "few_shot" and not record["train_data"]:
        # Results of a published model lack its name in the study; the run's name puts it beside its trained models.
        record["model_name"] = clean(run_model) or record["model_name"]
    members = [_member(role, record[role], path) for role in _ROLES if record.get(role)]
    method = (record["method"] or record["mode"]) + _guidance(members, record)
    name = clean(directory.path.name)
    problems = _problems(name, run_method, record)
    train_data = run_data or record["train_data"]
    same_data = record["data"] in (train_data, record["train_data"]) or problems.startswith(f"{train_data}-")
    stopped_at = first_integer(record.get("step"), 0) if record.get("finished") is False else None
    remarks = (
        "" if same_data or not train_data else f"trained on {train_data}",
        "" if record["mode"] == without_guidance(method) else f"asked for {record['mode']}",
        "" if record["calculator"] else "no calculator",
        f"temperature {record['temperature']:g}" if record["temperature"] else "",
        "" if stopped_at is None else f"stopped at step {stopped_at}",
    )
    warnings = record.get("warnings")
    return {
        **{
            name: record[name]
            for name in ("data", "split", "mode", "calculator", "temperature", "generated_tokens")
        },
        "evaluation_name": name,
        "results_path": path,
        "predictions_path": directory.predictions,
        "problems": problems,
        "remarks": remarks,
        "method": method,
        "sampling_seed": record["seed"],
        "train_seed": record.get("train_seed"),
        "stopped_at": stopped_at,
        "evaluated_train_data": record["train_data"],
        "evaluated_model": record["model_name"],
        "evaluated_parameters": record["num_parameters"],
        "total_parameters": first_integer(record.get("total_parameters"), record["num_parameters"]),
        "n": record["num_problems"],
        **{f"{rule}_correct": counts[None, rule][0] for rule in RULES},
        "by_num_steps": {
            num: count for (num, rule), count in counts.items() if num is not None and rule == "strict"
        },
        "unfinished_generations": record["unfinished"],
        "calculator_results_given": first_integer(record.get("calculator_results_given")),
        "evaluation_seconds": record["seconds"],
        "members": members,
        "backends": _backends(record.get("backends")),
        "warnings": [clean(str(warning)) for warning in warnings] if isinstance(warnings, list) else [],
    }


def _counts(path: Path, record: dict[str, Any]) -> dict[tuple[int | None, str], tuple[int, int]]:
    """Return (correct, n) by (number of steps, rule), None for all problems together, after checking that they add up."""
    counts = {(None, rule): _count(path, record["accuracy"], "accuracy", rule) for rule in RULES}
    groups: dict[tuple[int | None, str], tuple[int, int]] = {}
    for key, scores in record["by_num_steps"].items():
        if not key.isdecimal():
            raise UserError(
                f"{path}: by_num_steps has the key {key!r}, expected a number of steps; evaluate again"
            )
        groups |= {(int(key), rule): _count(path, scores, f"by_num_steps {key}", rule) for rule in RULES}
    for (_, rule), (correct, n) in counts.items():
        if n != record["num_problems"]:
            raise UserError(
                f"{path}: {rule} n is {n} but num_problems is {record['num_problems']}; evaluate again"
            )
        of_rule = [count for (_, other), count in groups.items() if other == rule]
        if of_rule and tuple(map(sum, zip(*of_rule, strict=True))) != (correct, n):
            raise UserError(f"{path}: by_num_steps does not add up to {rule} {correct}/{n}; evaluate again")
    if not record["num_problems"]:
        raise UserError(f"{path}: no problem was evaluated; evaluate again on shards that contain some")
    return counts | dict(sorted(groups.items()))


def _count(path: Path, scores: Any, where: str, rule: str) -> tuple[int, int]:
    entry = scores.get(rule) if isinstance(scores, dict) else None
    correct, n, stated = map((entry if isinstance(entry, dict) else {}).get, ("correct", "n", "accuracy"))
    if type(correct) is not int or type(n) is not int or not 0 <= correct <= n:
        raise UserError(f"{path}: {where} {rule} is {entry!r}, expected correct <= n; evaluate again")
    if n and isinstance(stated, (int, float)) and not abs(stated - correct / n) <= _ACCURACY_TOLERANCE:
        raise UserError(
            f"{path}: {where} {rule} says {stated} but {correct}/{n} = {correct / n:.4f}; evaluate again"
        )
    return correct, n


def _problems(name: str, run_method: str, record: dict[str, Any]) -> str:
    """Return the name of the set of problems, which a study may rename for its own data.

    The evaluation is called <data>-<split>-<mode>, where a guided pair has its run's method as the mode, followed by
    the settings that differ from the defaults.
    """
    usual = f"{record['data']}-{record['split']}"
    for mode in filter(None, (run_method, record["mode"])):
        found = re.fullmatch(f"(.+)-{re.escape(mode)}(?:-.*)?", name)
        if found and found[1] != usual:
            return found[1]
    return f"{record['data']} {record['split']}"


def _member(role: str, record: Any, path: Path) -> dict[str, Any]:
    """Return role, model_name and method of one model of a pair."""
    if not isinstance(record, dict) or any(type(record.get(key)) is not t for key, t in _ROLE_TYPES.items()):
        raise UserError(f"{path}: {role} is {record!r}, expected {', '.join(_ROLE_TYPES)}; evaluate again")
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
            if choice.get("compared_with") == "generate":  # not with the plain forward pass
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
    UserError if most lines are unreadable, because then it is another kind of file.
    """
    lines = [record for _, record in read_json_lines(path)]
    found = [_metrics_row(record) for record in lines if record and type(record.get("step")) is int]
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


def _metrics_row(record: dict[str, Any]) -> dict[str, Any]:
    validation = record.get("evaluation")
    values = validation if isinstance(validation, dict) else record
    row = {name: values.get(name) for name in columns.METRICS if columns.METRICS[name] == "float64"}
    numbers = {name: value if type(value) in (int, float) else np.nan for name, value in row.items()}
    return {"step": record["step"], "is_validation": values is validation, **numbers}


def read_predictions(path: Path, expected: dict[str, Any]) -> pd.DataFrame | None:
    """Return columns.PREDICTIONS of one evaluation, None if there is no predictions.jsonl.

    `expected`: n, strict_correct and flexible_correct of results.json. Raises UserError if the file is damaged,
    contains an id twice, or has other counts.
    """
    if not path.is_file():
        return None
    rows: dict[str, dict[str, Any]] = {}
    for number, record in read_json_lines(path):
        row = _prediction(record, f"{path}, line {number}")
        if row["id"] in rows:
            raise UserError(f"{path}, line {number}: id {row['id']!r} occurs twice; evaluate again")
        rows[row["id"]] = row
    for rule in RULES:
        counted = sum(row[f"correct_{rule}"] for row in rows.values()), len(rows)
        stated = expected[f"{rule}_correct"], expected["n"]
        if counted != stated:
            raise UserError(
                f"{path}: {counted[0]} of {counted[1]} {rule} correct, but "
                f"{path.with_name('results.json')} says {stated[0]} of {stated[1]}; evaluate again"
            )
    return columns.frame(list(rows.values()), columns.PREDICTIONS)


def _prediction(record: dict[str, Any] | None, where: str) -> dict[str, Any]:
    if record is None:
        raise UserError(f"{where}: not JSON of one object; evaluate again")
    if type(record.get("id")) is not str or any(type(record.get(f"correct_{r}")) is not bool for r in RULES):
        raise UserError(f"{where}: not a prediction (id, correct_strict, correct_flexible); evaluate again")
    steps, answer, tokens = (record.get(name) for name in ("gold_steps", "strict", "generated_tokens"))
    if steps is not None:
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise UserError(f"{where}: gold_steps is not a list of steps; evaluate again")
        steps = tuple(_gold_step(_text(step, "question"), _text(step, "solution")) for step in steps)
    return {
        **{name: _text(record, name) for name in ("id", "question", "gold", "text", "stopped")},
        **{f"correct_{rule}": record[f"correct_{rule}"] for rule in RULES},
        "correct": record["correct_strict"],
        "gold_steps": steps,
        "has_answer": isinstance(answer, str) and answer != "",
        "generated_tokens": tokens if type(tokens) is int else 0,
        "finished": record.get("finished") is not False,
    }


# All evaluations on a data set share the gold steps, so their values are computed once.
_gold_step = functools.lru_cache(maxsize=1 << 15)(StepText)


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    return value if isinstance(value, str) else "" if value is None else str(value)


def first_integer(*candidates: Any) -> int | None:
    """Return the first candidate that is an int (and no bool), else None."""
    return next((value for value in candidates if type(value) is int), None)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file. Raises UserError if it cannot be read or is not an object."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it or make it again") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} holds a {type(record).__name__}, expected an object; make it again")
    return record
