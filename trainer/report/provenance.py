"""Provenance of a report: date, cost, settings and versions of the runs, and remarks on single runs."""

from datetime import UTC, datetime
from typing import Any

from trainer.report import format
from trainer.report.columns import to_dicts
from trainer.report.format import replace_unprintable, stop_text
from trainer.report.load import StudyFrames
from trainer.report.report_data import ReportData
from trainer.report.run_files import first_integer

Facts = dict[str, str]  # name of a setting, a version etc. -> its value as text
# Key of environment.json -> name in the report. A report may be published, so hosts, commands and job ids are left out.
_ENVIRONMENT = {
    **{
        "versions": "",
        "python": "python",
        "device": "device",
        "processor": "processor",
        "launcher": "started by",
    },
    **{"world_size": "processes", "threads_per_rank": "threads of a process", "zero_stage": "ZeRO stage"},
    **{"dtype": "dtype", "code_revision": "code revision"},
}
_LAUNCHERS = {
    **{"env": "the deepspeed launcher or torchrun", "slurm": "srun", "mpi": "mpiexec"},
    "single": "no launcher, a single process",
}
# Training settings that affect the results and are not in the run's name. Settings that are False, 0 or empty are not shown.
_SETTINGS = """
per_device_train_batch_size gradient_accumulation_steps pack_length packing learning_rate lr_scheduler_type
warmup_steps warmup_ratio weight_decay max_grad_norm num_train_epochs max_steps bf16 train_on_calculator_results
gradient_checkpointing deepspeed
"""
# Evaluation settings that affect the results. They are shown for runs without training.
_EVALUATION_SETTINGS = "subquestions guidance_from max_steps max_new_tokens temperature dtype"


def facts_by_run(study: StudyFrames) -> tuple[Facts, list[tuple[dict[str, Any], Facts]]]:
    """Return (facts that all started trainings share, [(first row of a run, facts of the run that are not shared), ...])."""
    runs = [(rows[0], _facts(rows)) for rows in _rows_by_run(study)]
    trained = [facts for run, facts in runs if run["is_trained"] and (run["settings"] or run["environment"])]
    first = trained[0] if trained else {}
    shared = {
        name: value for name, value in first.items() if all(facts.get(name) == value for facts in trained)
    }
    own = [
        (run, {name: facts[name] for name in facts if facts[name] != shared.get(name)}) for run, facts in runs
    ]
    return shared, own


def totals(study: StudyFrames) -> Facts:
    """Return date and cost of all runs: the newest results.json, time of training and evaluation, and number of resumes."""
    runs, evaluations = to_dicts(study.runs.drop_duplicates("run_path")), study.evaluations
    resumes = [_num_resumes(run) for run in runs if _num_resumes(run)]
    facts = {
        "training, summed over runs": format.seconds(sum(run["training_seconds"] for run in runs)),
        "evaluation, summed over runs": format.seconds(evaluations["evaluation_seconds"].sum()),
        "resumed": f"{len(resumes)} of {len(runs)} runs, {sum(resumes)} times in all"
        if resumes
        else "no run",
    }
    if not evaluations.empty:
        newest = datetime.fromtimestamp(
            max(path.stat().st_mtime for path in evaluations["results_path"]), UTC
        )
        facts = {"newest results.json": f"{newest:%Y-%m-%d %H:%M} UTC, by the file's time", **facts}
    return facts


def _num_resumes(run: dict[str, Any]) -> int:
    """Return how often a training was resumed from a checkpoint; at least 1 if steps were undone."""
    return max(first_integer(run["environment"].get("num_resumes"), 0) or 0, int(run["undone_steps"] > 0))


def _rows_by_run(study: StudyFrames) -> list[list[dict[str, Any]]]:
    rows_by_run: dict[Any, list[dict[str, Any]]] = {}
    for row in to_dicts(study.runs):
        rows_by_run.setdefault(row["run_path"], []).append(row)
    return list(rows_by_run.values())


def _facts(rows: list[dict[str, Any]]) -> Facts:
    """Return the facts of a run: settings, environment, layout of the training examples, models of a pair, backends.

    `rows` are the rows of the run (columns.RUNS), one per evaluation.
    """
    run = rows[0]
    settings, environment = run["settings"], run["environment"]
    names = _SETTINGS if run["is_trained"] else _EVALUATION_SETTINGS
    facts = {name: settings[name] for name in names.split() if settings.get(name)}
    if run["is_trained"]:
        if "max_steps" in facts:  # max_steps overrides num_train_epochs
            facts.pop("num_train_epochs", None)
        if "deepspeed" in facts:  # in `environment`, the key "deepspeed" holds DeepSpeed's version
            facts["DeepSpeed config"] = facts.pop("deepspeed")
        recorded = {shown: environment[name] for name, shown in _ENVIRONMENT.items() if name in environment}
        if "started by" in recorded:
            recorded["started by"] = _LAUNCHERS.get(recorded["started by"], recorded["started by"])
        if recorded.get("device") in (recorded.get("processor"), "cpu", "x86_64"):
            recorded.pop("device", None)  # the processor's name says more
        facts = _flatten(facts | recorded)
        layout = environment.get("layout")
        if isinstance(layout, dict):  # older versions did not record the layout
            facts |= {
                "layout of examples": f"{layout['rows']} (attention {layout['attention']})",
                "its logits differ from the plain forward pass's by": (
                    f"{layout['largest_difference']:.0e} standard deviations (allowed: {layout['tolerance']:.0e}; "
                    f"{layout['compared_examples']} examples, {layout['compared_in']})"
                ),
            }
    else:
        max_steps = facts.pop("max_steps", None)
        if max_steps and settings.get("decomposer"):
            facts["most sub-questions"] = max_steps
        members = [member for row in rows for member in row["members"] or []]
        facts = _flatten({m["role"]: f"{m['model_name']} ({m['method']})" for m in members} | facts)
    backends = [backend for row in rows for backend in row["backends"] or []]
    if backends:
        facts["answers decoded by"] = ", ".join(sorted({backend["name"] for backend in backends}))
    differences = [backend["difference"] for backend in backends if backend["difference"] is not None]
    if differences:
        largest = f"at most {max(differences):.0e} standard deviations"
        facts["their logits differ from the plain forward pass's by"] = largest
    return facts


def _flatten(record: dict[str, Any]) -> Facts:
    """Return the texts, numbers and booleans of nested dicts as one dict of texts."""
    facts: Facts = {}
    for name, value in record.items():
        if isinstance(value, dict):
            facts |= _flatten(value)
        elif isinstance(value, bool):
            facts[replace_unprintable(str(name))] = "yes" if value else "no"
        elif isinstance(value, (str, int, float)) and str(value):
            facts[replace_unprintable(str(name))] = replace_unprintable(str(value))
    return facts


def remarks(data: ReportData) -> list[tuple[str, str]]:
    """Return a list of (name of a run or evaluation, remark), e.g. warnings and the number of steps without a finite loss."""
    numbers = {path: number for number, path in data.evaluations["results_path"].items()}
    predictions = dict(list(data.predictions.groupby("evaluation")))
    remarks: list[tuple[str, str]] = []
    for rows in _rows_by_run(data.study):
        run = rows[0]
        counted = {
            "unreadable lines in the training log, cut by a kill and left out": run["broken_metrics_lines"],
            "steps undone and trained again after a resume": run["undone_steps"],
            "times resumed from a checkpoint": _num_resumes(run),
            "steps without a finite loss": run["non_finite_losses"],
        }
        remarks += [(run["run"], f"{text}: {number}") for text, number in counted.items() if number]
        reason = (run["environment"].get("layout") or {}).get("fallback_reason")
        if reason:
            text = f"trained with a slower layout of examples: {replace_unprintable(reason)}"
            remarks.append((run["run"], text))
        for row in rows if run["evaluation_name"] else []:
            notes = row["warnings"] + [
                f"the {backend['role']} was decoded by the backend {backend['name']}: {backend['reason']}"
                for backend in row["backends"]
                if backend["reason"]
            ]
            answers = predictions.get(numbers[row["results_path"]])
            if answers is not None:
                stopped = answers["stopped"][answers["stopped"] != ""].value_counts().sort_index()
                notes += [
                    f"answers {stop_text(replace_unprintable(reason))}: {n}" for reason, n in stopped.items()
                ]
                if answers["error_type"].isna().any():
                    notes.append("predictions without gold steps, of an older version: no causes, no quality")
            remarks += [(f"{run['run']}, {row['evaluation_name']}", text) for text in notes]
    return remarks
