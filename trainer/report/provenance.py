"""Provenance: settings, versions, and remarks on single runs."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import Any

from trainer.report.columns import records
from trainer.report.format import clean
from trainer.report.load import Study
from trainer.report.report_data import ReportData

Facts = dict[str, str]
# Of environment.json. Hosts, commands and job numbers stay in the run directories, because reports are passed around.
_ENVIRONMENT = "versions python device launcher world_size threads_per_rank zero_stage dtype code_revision"
# Of settings.yaml: settings that decide the numbers and are not in the run's name. Off and empty ones are not shown.
_SETTINGS = """
per_device_train_batch_size gradient_accumulation_steps pack_length packing learning_rate lr_scheduler_type
warmup_steps warmup_ratio weight_decay max_grad_norm num_train_epochs max_steps bf16 train_on_calculator_results
train_on_calculator_results gradient_checkpointing deepspeed
"""
# The same of a run that only evaluates other runs' students.
_ASKED = ("subquestions", "guidance_from", "max_steps", "max_new_tokens", "temperature", "dtype")


def facts_by_run(study: Study) -> tuple[Facts, list[tuple[dict[str, Any], Facts]]]:
    """Return the facts that all started trainings share, and for each run (columns.RUNS) the others."""
    runs = [(rows[0], _made_with(rows) | _layout(rows[0]) | _decoding(rows)) for rows in _rows_by_run(study)]
    trained = [f for run, f in runs if run["is_trained"] and (run["settings"] or run["environment"])]
    first = trained[0] if trained else {}
    shared = {name: value for name, value in first.items() if all(f.get(name) == value for f in trained)}
    return shared, [(run, {name: f[name] for name in f if name not in shared}) for run, f in runs]


def remarks(data: ReportData) -> list[tuple[str, str]]:
    """Return (run, remark that a reader of its numbers should know)."""
    by_results = {path: number for number, path in data.evaluations["results_path"].items()}
    predictions = dict(list(data.predictions.groupby("evaluation")))
    found = []
    for evaluations in _rows_by_run(data.study):
        run = evaluations[0]
        counted = {
            "unreadable lines in the training log, cut by a kill and left out": run["broken_metrics_lines"],
            "steps undone and trained again after a resume": run["undone_steps"],
            "steps without a finite loss": run["non_finite_losses"],
        }
        found += [(run["run"], f"{text}: {number}") for text, number in counted.items() if number]
        reason = (run["environment"].get("layout") or {}).get("fallback_reason")
        if reason:
            found.append((run["run"], f"trained with a slower layout of examples: {clean(reason)}"))
        for row in evaluations if run["evaluation_name"] else []:
            notes = row["warnings"] + [
                f"the {backend['role']} was decoded by the backend {backend['name']}: {backend['reason']}"
                for backend in row["backends"]
                if backend["reason"]
            ]
            answers = predictions.get(by_results[row["results_path"]])
            if answers is not None:
                stopped = answers["stopped"][answers["stopped"] != ""].value_counts().sort_index()
                notes += [f"answers cut at {clean(why)}: {n}" for why, n in stopped.items()]
                if answers["error_type"].isna().any():
                    notes.append("predictions without gold steps, of an older version: no causes, no quality")
            found += [(f"{run['run']}, {row['evaluation_name']}", text) for text in notes]
    return found


def _rows_by_run(study: Study) -> list[list[dict[str, Any]]]:
    """Return the rows of each run as dicts (columns.RUNS)."""
    return [list(rows) for _, rows in groupby(records(study.runs), key=itemgetter("run_path"))]


def _layout(run: dict[str, Any]) -> Facts:
    """Return the layout of a training's examples, and the difference of its logits from the model's own."""
    layout = run["environment"].get("layout")
    if not run["is_trained"] or not isinstance(layout, dict):  # of an older version
        return {}
    return {
        "layout of examples": f"{layout['rows']} (attention {layout['attention']})",
        "its logits differ from the plain forward pass's by": f"{layout['largest_difference']:.0e} standard deviations "
        f"(allowed: {layout['tolerance']:.0e}; {layout['compared_examples']} examples, {layout['compared_in']})",
    }


def _decoding(rows: list[dict[str, Any]]) -> Facts:
    """Return the backends that decoded a run's answers, and the largest difference of their logits."""
    backends = [backend for row in rows for backend in row["backends"] or []]
    if not backends:
        return {}
    found = {"answers decoded by": ", ".join(sorted({backend["name"] for backend in backends}))}
    differences = [backend["difference"] for backend in backends if backend["difference"] is not None]
    if differences:
        largest = f"at most {max(differences):.0e} standard deviations"
        found["their logits differ from the plain forward pass's by"] = largest
    return found


def _made_with(rows: list[dict[str, Any]]) -> Facts:
    run = rows[0]
    if not run["is_trained"]:
        members = {
            m["role"]: f"{m['model_name']} ({m['method']})" for row in rows for m in row["members"] or []
        }
        asked = {name: run["settings"][name] for name in _ASKED if run["settings"].get(name)}
        max_steps = asked.pop("max_steps", None)
        if max_steps and run["settings"].get("decomposer"):
            asked["most sub-questions"] = max_steps
        return _flatten(members | asked)
    settings = {name: run["settings"][name] for name in _SETTINGS.split() if run["settings"].get(name)}
    if "max_steps" in settings:
        settings.pop("num_train_epochs", None)  # max_steps wins
    if "deepspeed" in settings:  # the file; DeepSpeed's version has the same name
        settings["DeepSpeed config"] = settings.pop("deepspeed")
    environment = {
        name: run["environment"][name] for name in _ENVIRONMENT.split() if name in run["environment"]
    }
    return _flatten(settings) | _flatten(environment)


def _flatten(record: dict[str, Any]) -> Facts:
    """Return nested facts as one level of text."""
    facts: Facts = {}
    for name, value in record.items():
        if isinstance(value, dict):
            facts |= _flatten(value)
        elif isinstance(value, bool):
            facts[clean(str(name))] = "yes" if value else "no"
        elif isinstance(value, (str, int, float)) and str(value):
            facts[clean(str(name))] = clean(str(value))
    return facts
