"""Provenance: settings, versions, and remarks on single runs."""

from __future__ import annotations

from typing import Any

from trainer.report.columns import records
from trainer.report.format import clean
from trainer.report.load import StudyFrames
from trainer.report.report_data import ReportData

Facts = dict[str, str]
# Of environment.json. Hosts, commands and job numbers stay in the run directories, because reports are shared.
_ENVIRONMENT = "versions python device launcher world_size threads_per_rank zero_stage dtype code_revision"
# Of settings.yaml: settings that decide the numbers and are not in the run's name. False and empty ones are left out.
_SETTINGS = """
per_device_train_batch_size gradient_accumulation_steps pack_length packing learning_rate lr_scheduler_type
warmup_steps warmup_ratio weight_decay max_grad_norm num_train_epochs max_steps bf16 train_on_calculator_results
gradient_checkpointing deepspeed
"""
# The same for a run that only evaluates models of other runs.
_EVALUATION_SETTINGS = "subquestions guidance_from max_steps max_new_tokens temperature dtype"


def facts_by_run(study: StudyFrames) -> tuple[Facts, list[tuple[dict[str, Any], Facts]]]:
    """Return the facts that all started trainings share, and for each run (columns.RUNS) the others."""
    runs = [(rows[0], _facts(rows)) for rows in _rows_by_run(study)]
    trained = [f for run, f in runs if run["is_trained"] and (run["settings"] or run["environment"])]
    first = trained[0] if trained else {}
    shared = {name: value for name, value in first.items() if all(f.get(name) == value for f in trained)}
    return shared, [(run, {name: f[name] for name in f if name not in shared}) for run, f in runs]


def _rows_by_run(study: StudyFrames) -> list[list[dict[str, Any]]]:
    """Return the rows of each run as dicts (columns.RUNS)."""
    return [records(rows) for _, rows in study.runs.groupby("run_path", sort=False)]


def _facts(rows: list[dict[str, Any]]) -> Facts:
    """Return settings, environment, layout of the training examples and generation backends of a run."""
    run = rows[0]
    settings, environment = run["settings"], run["environment"]
    names = _SETTINGS if run["is_trained"] else _EVALUATION_SETTINGS
    facts = {name: settings[name] for name in names.split() if settings.get(name)}
    layout = environment.get("layout")
    if run["is_trained"]:
        if "max_steps" in facts:  # overrides the number of epochs
            facts.pop("num_train_epochs", None)
        if "deepspeed" in facts:  # the config file; DeepSpeed's version has the same name
            facts["DeepSpeed config"] = facts.pop("deepspeed")
        facts = _flatten(facts) | _flatten(
            {n: environment[n] for n in _ENVIRONMENT.split() if n in environment}
        )
    else:
        max_steps = facts.pop("max_steps", None)
        if max_steps and settings.get("decomposer"):
            facts["most sub-questions"] = max_steps
        members = [member for row in rows for member in row["members"] or []]
        facts = _flatten({m["role"]: f"{m['model_name']} ({m['method']})" for m in members} | facts)
    if run["is_trained"] and isinstance(layout, dict):  # older versions recorded none
        facts |= {
            "layout of examples": f"{layout['rows']} (attention {layout['attention']})",
            "its logits differ from the plain forward pass's by": (
                f"{layout['largest_difference']:.0e} standard deviations (allowed: {layout['tolerance']:.0e}; "
                f"{layout['compared_examples']} examples, {layout['compared_in']})"
            ),
        }
    backends = [backend for row in rows for backend in row["backends"] or []]
    if backends:
        facts["answers decoded by"] = ", ".join(sorted({backend["name"] for backend in backends}))
    differences = [backend["difference"] for backend in backends if backend["difference"] is not None]
    if differences:
        largest = f"at most {max(differences):.0e} standard deviations"
        facts["their logits differ from the plain forward pass's by"] = largest
    return facts


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


def remarks(data: ReportData) -> list[tuple[str, str]]:
    """Return (run, remark that a reader of its numbers should know)."""
    numbers = {path: number for number, path in data.evaluations["results_path"].items()}
    predictions = dict(list(data.predictions.groupby("evaluation")))
    found = []
    for rows in _rows_by_run(data.study):
        run = rows[0]
        counted = {
            "unreadable lines in the training log, cut by a kill and left out": run["broken_metrics_lines"],
            "steps undone and trained again after a resume": run["undone_steps"],
            "steps without a finite loss": run["non_finite_losses"],
        }
        found += [(run["run"], f"{text}: {number}") for text, number in counted.items() if number]
        reason = (run["environment"].get("layout") or {}).get("fallback_reason")
        if reason:
            found.append((run["run"], f"trained with a slower layout of examples: {clean(reason)}"))
        for row in rows if run["evaluation_name"] else []:
            notes = row["warnings"] + [
                f"the {backend['role']} was decoded by the backend {backend['name']}: {backend['reason']}"
                for backend in row["backends"]
                if backend["reason"]
            ]
            answers = predictions.get(numbers[row["results_path"]])
            if answers is not None:
                stopped = answers["stopped"][answers["stopped"] != ""].value_counts().sort_index()
                notes += [f"answers cut at {clean(why)}: {n}" for why, n in stopped.items()]
                if answers["error_type"].isna().any():
                    notes.append("predictions without gold steps, of an older version: no causes, no quality")
            found += [(f"{run['run']}, {row['evaluation_name']}", text) for text in notes]
    return found
