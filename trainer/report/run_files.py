"""Read and check single files of a run: settings.yaml, results.json, metrics.jsonl and predictions.jsonl.

The report computes accuracies and intervals from the counts in these files. A file that contradicts itself raises
UserError.
"""

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from trainer.errors import UserError
from trainer.problems.answers import ANSWER_RULES
from trainer.report import columns
from trainer.report.format import replace_unprintable
from trainer.report.methods import GUIDED, without_guidance
from trainer.report.solution_steps import SolutionStep
from trainer.settings import TrainSettings
from trainer.storage.configuration import rename_old_keys
from trainer.storage.json_lines import read_json_lines
from trainer.storage.run_directory import EvaluationDirectory, parse_run_name

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
    """Return the evaluation columns of columns.RUNS for one results.json. `run` is the name of the run.

    Raises UserError, with the path and the wrong value, if the file is damaged or has another format.
    """
    path = directory.results
    record = read_json(path)
    if record.get("format") != 1:
        raise UserError(
            f"{path}: format is {record.get('format')!r}, expected 1; another version of the trainer wrote the file"
        )
    types = _TYPES if record.get("train_seed") is None else _TYPES | {"train_seed": int}
    for key, expected in types.items():
        if expected is float and type(record.get(key)) is int:
            record[key] = float(record[key])
        if type(record.get(key)) is not expected:
            raise _damaged(path, f"{key} is {record.get(key)!r}, expected {expected.__name__}")
    correct, by_num_steps = _counts(path, record)
    record |= {key: replace_unprintable(record[key]) for key in _TEXTS}
    run_data, run_method, run_model, _ = parse_run_name(run)
    if record["mode"] == "few_shot" and not record["train_data"]:
        # Use the model name in the run's name, so that the base model is named like the models trained from it.
        record["model_name"] = replace_unprintable(run_model) or record["model_name"]
    members = [_member(role, record[role], path) for role in _ROLES if record.get(role)]
    method = (record["method"] or record["mode"]) + _guidance(members, record)
    name = replace_unprintable(directory.path.name)
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
    warnings = record["warnings"] if isinstance(record.get("warnings"), list) else []
    copied = ("data", "split", "mode", "calculator", "temperature", "generated_tokens")
    return {
        **{key: record[key] for key in copied},
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
        **{f"{rule}_correct": correct[rule] for rule in ANSWER_RULES},
        "by_num_steps": by_num_steps,
        "unfinished_generations": record["unfinished"],
        "calculator_results_given": first_integer(record.get("calculator_results_given")),
        "evaluation_seconds": record["seconds"],
        "members": members,
        "backends": _backends(record.get("backends")),
        "warnings": [replace_unprintable(str(warning)) for warning in warnings],
    }


def _counts(path: Path, record: dict[str, Any]) -> tuple[dict[str, int], dict[int, tuple[int, int]]]:
    """Return two dicts of counts: {rule: correct answers}, and {number of gold steps: (correct answers, problems)}.

    The second dict is for the strict rule. Raises UserError if the counts contradict each other or if there are no problems.
    """
    for key in record["by_num_steps"]:
        if not key.isdecimal():
            raise _damaged(path, f"by_num_steps has the key {key!r}, expected a number of steps")
    correct, by_num_steps = {}, {}
    for rule in ANSWER_RULES:
        correct[rule], n = total = _count(path, record["accuracy"], "accuracy", rule)
        by_num_steps[rule] = {
            int(key): _count(path, scores, f"by_num_steps {key}", rule)
            for key, scores in record["by_num_steps"].items()
        }
        if n != record["num_problems"]:
            raise _damaged(path, f"{rule} n is {n} but num_problems is {record['num_problems']}")
        if by_num_steps[rule] and tuple(map(sum, zip(*by_num_steps[rule].values(), strict=True))) != total:
            raise _damaged(path, f"by_num_steps does not add up to {rule} {correct[rule]}/{n}")
    if not record["num_problems"]:
        raise UserError(f"{path}: no problem was evaluated; evaluate again on shards that contain problems")
    return correct, dict(sorted(by_num_steps["strict"].items()))


def _count(path: Path, scores: Any, where: str, rule: str) -> tuple[int, int]:
    entry = scores.get(rule) if isinstance(scores, dict) else None
    correct, n, stated = map((entry if isinstance(entry, dict) else {}).get, ("correct", "n", "accuracy"))
    if type(correct) is not int or type(n) is not int or not 0 <= correct <= n:
        raise _damaged(path, f"{where} {rule} is {entry!r}, expected correct <= n")
    if n and isinstance(stated, (int, float)) and not abs(stated - correct / n) <= _ACCURACY_TOLERANCE:
        raise _damaged(path, f"{where} {rule} says {stated} but {correct}/{n} = {correct / n:.4f}")
    return correct, n


def _problems(name: str, run_method: str, record: dict[str, Any]) -> str:
    """Return the name of the problem set in the study file; "<data> <split>" if the problem set has no name there.

    `name` is the name of the evaluation: <problem set>-<mode>, followed by the settings that differ from the defaults.
    For a pair with a planner, <mode> is the method of the run.
    """
    for mode in filter(None, (run_method, record["mode"])):
        match = re.fullmatch(f"(.+)-{re.escape(mode)}(?:-.*)?", name)
        if match and match[1] != f"{record['data']}-{record['split']}":
            return match[1]
    return f"{record['data']} {record['split']}"


def _member(role: str, record: Any, path: Path) -> dict[str, Any]:
    if not isinstance(record, dict) or any(type(record.get(key)) is not t for key, t in _ROLE_TYPES.items()):
        raise _damaged(path, f"{role} is {record!r}, expected {', '.join(_ROLE_TYPES)}")
    return {
        "role": role,
        "model_name": replace_unprintable(record["model_name"]),
        "method": replace_unprintable(record["method"]),
    }


def _backends(record: Any) -> list[dict[str, Any]]:
    """Return a dict per role, with keys role, name, difference, reason; [] for results of older versions.

    name: name of the role's generation backend. difference: largest difference of its logits from those of the plain forward
    pass, in standard deviations; None if not compared. reason: reason why the slot backend was rejected, or "".
    """
    backends = []
    for role, choice in record.items() if isinstance(record, dict) else ():
        if isinstance(choice, dict) and choice.get("name"):
            name, difference = replace_unprintable(str(choice["name"])), choice.get("difference")
            if choice.get("compared_with") == "generate":  # not compared with the plain forward pass
                difference, name = None, f"{name} (as generate decodes)"
            number = float(difference) if isinstance(difference, (int, float)) else None
            reason = replace_unprintable(str(choice.get("reason") or ""))
            role = replace_unprintable(str(role))
            backends.append({"role": role, "name": name, "difference": number, "reason": reason})
    return backends


def _guidance(members: list[dict[str, Any]], record: dict[str, Any]) -> str:
    """Return e.g. "+operators" if the decomposer reads a plan, "+gold operators" if it reads a gold plan, "" without a plan."""
    method = next((member["method"] for member in members if member["role"] == "decomposer"), "")
    if not method.startswith("decomposer"):
        return ""
    guidance = method.removeprefix("decomposer").removeprefix("_interleaved").removeprefix("_")
    gold = "gold " if record.get("guidance_from") == "gold" else ""
    return f"{GUIDED}{gold}{guidance}" if guidance else ""


def read_metrics(path: Path) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return a training log as a frame of columns.METRICS, and a dict with counts of dropped lines.

    A missing file gives an empty log. If a step number does not increase, the run resumed from an earlier checkpoint: all
    earlier lines with the same or a higher step number are dropped (undone_steps). Lines that are not JSON with a step
    (cut when the process was killed) are dropped too (broken_metrics_lines). Raises UserError if they are the majority.
    """
    lines = [record for _, record in read_json_lines(path)]
    rows = [_metrics_row(record) for record in lines if record and type(record.get("step")) is int]
    broken = len(lines) - len(rows)
    if broken > 1 and 2 * broken > len(lines):
        raise UserError(
            f"{path}: {broken} of {len(lines)} lines are not metrics (JSON with a step); restore the file"
        )
    metrics = columns.frame(rows, columns.METRICS)
    steps = metrics["step"].where(~metrics["is_validation"])
    next_steps = steps[::-1].cummin().ffill()[::-1].shift(-1, fill_value=math.inf).fillna(math.inf)
    is_undone = metrics["step"] >= next_steps
    valid = metrics[~is_undone].drop_duplicates(["step", "is_validation"], keep="last")
    undone_steps = int((is_undone & ~metrics["is_validation"]).sum())
    counts = {"broken_metrics_lines": broken, "undone_steps": undone_steps}
    return valid.sort_values("step", kind="stable", ignore_index=True), counts


def _metrics_row(record: dict[str, Any]) -> dict[str, Any]:
    validation = record.get("evaluation")
    values = validation if isinstance(validation, dict) else record
    numbers = {name: value for name, value in values.items() if type(value) in (int, float)}
    return numbers | {"step": record["step"], "is_validation": values is validation}


def read_predictions(path: Path, expected: dict[str, Any]) -> pd.DataFrame | None:
    """Return a frame of columns.PREDICTIONS for one evaluation, or None if there is no predictions.jsonl.

    `expected` holds n, strict_correct and flexible_correct of results.json. Raises UserError if the file is damaged, if it
    contains an id twice, or if its counts differ from `expected`.
    """
    if not path.is_file():
        return None
    rows: dict[str, dict[str, Any]] = {}
    for number, record in read_json_lines(path):
        row = _prediction(record, f"{path}, line {number}")
        if row["id"] in rows:
            raise _damaged(f"{path}, line {number}", f"id {row['id']!r} occurs twice")
        rows[row["id"]] = row
    for rule in ANSWER_RULES:
        correct, stated = sum(row[f"correct_{rule}"] for row in rows.values()), expected[f"{rule}_correct"]
        if (correct, len(rows)) != (stated, expected["n"]):
            results = f"{path.with_name('results.json')} says {stated} of {expected['n']}"
            raise _damaged(path, f"{correct} of {len(rows)} {rule} correct, but {results}")
    return columns.frame(list(rows.values()), columns.PREDICTIONS)


def _prediction(record: dict[str, Any] | None, where: str) -> dict[str, Any]:
    if record is None:
        raise _damaged(where, "not JSON of one object")
    flags = {f"correct_{rule}": record.get(f"correct_{rule}") for rule in ANSWER_RULES}
    if type(record.get("id")) is not str or any(type(flag) is not bool for flag in flags.values()):
        raise _damaged(where, "not a prediction (id, correct_strict, correct_flexible)")
    steps, answer, tokens = (record.get(name) for name in ("gold_steps", "strict", "generated_tokens"))
    if steps is not None:
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise _damaged(where, "gold_steps is not a list of steps")
        steps = tuple(_gold_step(_text(step, "question"), _text(step, "solution")) for step in steps)
    return {
        **{name: _text(record, name) for name in ("id", "question", "gold", "text", "stopped")},
        **flags,
        "correct": record["correct_strict"],
        "gold_steps": steps,
        "has_answer": isinstance(answer, str) and answer != "",
        "generated_tokens": tokens if type(tokens) is int else 0,
        "finished": record.get("finished") is not False,
    }


# All evaluations on a data set have the same gold steps. With the cache, each step is parsed once.
_gold_step = functools.lru_cache(maxsize=1 << 15)(SolutionStep)


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    return value if isinstance(value, str) else "" if value is None else str(value)


def _damaged(where: Path | str, problem: str) -> UserError:
    return UserError(f"{where}: {problem}; evaluate again")


def first_integer(*candidates: Any) -> int | None:
    """Return the first candidate that is an int and not a bool, else None."""
    return next((value for value in candidates if type(value) is int), None)


def read_settings(path: Path) -> dict[str, Any]:
    """Return settings.yaml of a run or study, with old names of settings replaced; {} for a missing or empty file.

    Raises UserError if the file cannot be read or is not a mapping.
    """
    if not path.is_file():
        return {}
    settings = read_json(path, lambda text: {} if (parsed := yaml.safe_load(text)) is None else parsed)
    rename_old_keys(TrainSettings, settings, str(path))
    return settings


def read_json(path: Path, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """Return the dict that `parse` makes of a file's text. Raises UserError if the file cannot be read or holds no dict."""
    try:
        record = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore the file") from None
    if not isinstance(record, dict):
        raise UserError(
            f"{path} holds a {type(record).__name__}, expected keys with values; restore the file"
        )
    return record
