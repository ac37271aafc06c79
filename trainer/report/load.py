"""Load studies from disk into pandas frames, from which all tables, figures and texts of the report are made.

columns.py documents the frames. Incomplete runs have rows too. Their column `missing` names the first unfinished stage.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from trainer.errors import UserError
from trainer.problems.answers import ANSWER_RULES
from trainer.report import columns
from trainer.report.format import replace_unprintable
from trainer.report.methods import canonical, is_role_of_pair, method_order
from trainer.report.run_files import first_integer, read_evaluation, read_json, read_metrics, read_settings
from trainer.report.statistics import wilson_interval
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory, StudyDirectory, parse_run_name

STEPS_OF_FINAL_LOSS = 20


@dataclass(frozen=True)
class StudyFrames:
    """All runs of a report. `runs`: frame with the columns in columns.RUNS. `metrics`: run path -> frame (columns.METRICS)."""

    runs: pd.DataFrame
    metrics: dict[Path, pd.DataFrame]

    @property
    def evaluations(self) -> pd.DataFrame:
        """Return the rows that have an evaluation, sorted by panel, size, model, method and seed."""
        rows = self.runs[self.runs["evaluation_name"].notna()]
        keys = rows.assign(order=rows["method"].map(method_order), train_seed=rows["train_seed"].fillna(0))
        return _sort(
            rows, keys, "panel_rank", "parameters", "model", "order", "train_seed", "run", "sampling_seed"
        )


def load_frames(directories: list[Path]) -> StudyFrames:
    """Return the frames of all runs in the given study or run directories, including planned runs that have not started.

    Each run is loaded once. Rows are sorted by study, size of the model, model, method, seed and run name. Raises UserError
    if a directory has no runs, or if results are unreadable or contradictory.
    """
    metrics: dict[Path, pd.DataFrame] = {}
    rows: list[dict[str, Any]] = []
    for directory, planned in _find_runs(directories):
        metrics[directory.path], counts = read_metrics(directory.metrics)
        rows += _load_run(directory, planned, training_columns(metrics[directory.path]) | counts)
    models = {parse_run_name(row["run"])[2]: row for row in rows if row["parameters"] is not None}
    for row in rows:
        same_model = models.get(parse_run_name(row["run"])[2])
        # If a run stopped before it recorded its model, take the model's name and size from another run of that model.
        if row["parameters"] is None and same_model is not None:
            row |= {name: same_model[name] for name in ("model", "parameters")}
    members = {(member["model_name"], member["method"]) for row in rows for member in row.get("members", ())}
    for row in rows:
        if is_role_of_pair(row["run_method"]) and not row["missing"] and "members" not in row:
            is_used = (row["model"], row["run_method"]) in members
            row["missing"] = "" if is_used else "model of a pair, but no pair with it is evaluated"
    frame = columns.frame(rows, columns.RUNS)
    for rule in ANSWER_RULES:
        correct, n = frame[[f"{rule}_correct", "n"]].to_numpy(np.float64, na_value=np.nan).T
        frame[f"{rule}_accuracy"] = correct / n
        frame[f"{rule}_low"], frame[f"{rule}_high"] = wilson_interval(correct, n)
    keys = _panel_keys(rows)
    # Panels whose titles have fewer components come first.
    ranked = sorted({key for key in keys if key}, key=lambda key: (sum(map(bool, key)), key))
    frame["panel"] = [" · ".join(filter(None, key)) if key else None for key in keys]
    frame["panel_rank"] = pd.array([ranked.index(key) if key else None for key in keys], dtype="Int64")
    frame["is_plain"] = [not any(key[2:]) if key else None for key in keys]
    order = frame["run_method"].map(method_order)
    sort_keys = frame.fillna({"parameters": 0, "seed": -1}).assign(order=order)
    runs = _sort(frame, sort_keys, "study", "parameters", "model", "order", "seed", "run")
    return StudyFrames(runs, metrics)


def _sort(frame: pd.DataFrame, keys: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Return the rows of `frame`, sorted by the columns `names` of the frame `keys`."""
    return frame.loc[keys.sort_values(list(names), kind="stable").index].reset_index(drop=True)


def _panel_keys(rows: list[dict[str, Any]]) -> list[tuple[str, ...] | None]:
    """Return for each row the components of its panel's title, or None if the row has no evaluation.

    The study is a component only if several studies have a run of the same name. The name of the evaluation is a
    component only if several evaluations of a run would otherwise have the same title and the same sampling seed.
    """
    is_ambiguous = len({row["run"] for row in rows}) < len({row["run_path"] for row in rows})
    keys = [
        (row["study"] if is_ambiguous else "", row["problems"], *row["remarks"])
        if "problems" in row
        else None
        for row in rows
    ]
    models = [(key, row["run"], row.get("sampling_seed")) for key, row in zip(keys, rows, strict=True)]
    is_repeated = pd.Series(models, dtype=object).duplicated(keep=False)
    return [
        key and (*key, row["evaluation_name"] if repeated else "")
        for key, row, repeated in zip(keys, rows, is_repeated, strict=True)
    ]


def is_run(path: Path) -> bool:
    """Return whether a directory is a run directory: it contains the settings or metrics of a run."""
    return RunDirectory(path).settings.is_file() or RunDirectory(path).metrics.is_file()


def _find_runs(directories: list[Path]) -> list[tuple[RunDirectory, set[str]]]:
    """Return each run directory once, with the names of its planned evaluations."""
    found: dict[Path, tuple[RunDirectory, set[str]]] = {}
    for path in directories:
        if not path.is_dir():
            raise UserError(f"{path} is not a directory; name a study directory or a run directory")
        study = StudyDirectory(path.resolve().parent if is_run(path) else path)
        plan = _planned_evaluations(study)
        runs = [RunDirectory(path)] if is_run(path) else [*study.runs(), *map(study.run, plan)]
        if not runs:
            raise UserError(
                f"{path} holds no runs (folders with a settings.yaml); name a study directory such as runs/quickstart"
            )
        found |= {run.path.resolve(): (run, plan.get(run.name, set())) for run in runs}
    return list(found.values())


def _planned_evaluations(study: StudyDirectory) -> dict[str, set[str]]:
    """Return {run name: names of its planned evaluations} from the study's settings file; {} if the file is missing."""
    runs = read_settings(study.settings).get("runs")
    plan = {}
    for name, run in runs.items() if isinstance(runs, dict) else ():
        if isinstance(run, dict):
            evaluations = run.get("evaluate")
            plan[str(name)] = set(map(str, evaluations)) if isinstance(evaluations, dict) else set()
    return plan


def _load_run(directory: RunDirectory, planned: set[str], training: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each finished evaluation of a run, or one row without a result if no evaluation is finished.

    training: columns to add to every row.
    """
    name = replace_unprintable(directory.name)
    settings = read_settings(directory.settings)
    environment = read_json(directory.environment) if directory.environment.is_file() else {}
    is_trained = "shards" not in settings
    trained = settings if is_trained else {}  # in an evaluation, seed and max_steps have other meanings
    manifest = _manifest_facts(directory)
    facts = environment | manifest
    data, method, model, seed = parse_run_name(name)
    names = {evaluation for evaluation in directory.evaluation_names() if not evaluation.startswith(".")}
    names |= planned
    finished = {evaluation for evaluation in names if directory.evaluation(evaluation).results.is_file()}
    evaluations = [read_evaluation(directory.evaluation(evaluation), name) for evaluation in sorted(finished)]
    first = evaluations[0] if evaluations else {}

    def fact(key: str, otherwise: Any) -> str:
        return replace_unprintable(str(facts.get(key) or otherwise))

    train_data = data or str(facts.get("data") or first.get("evaluated_train_data", ""))
    run = {
        "study": replace_unprintable(directory.path.resolve().parent.name),
        "run": name,
        "run_path": directory.path,
        "train_data": replace_unprintable(train_data),
        "run_method": first.get("method") or canonical(fact("method", trained.get("method") or method)),
        "model": first.get("evaluated_model")
        or fact("model_name", trained.get("model_label") or model or name),
        "seed": first_integer(first.get("train_seed"), facts.get("seed"), trained.get("seed"), seed),
        "parameters": first_integer(first.get("evaluated_parameters"), facts.get("num_parameters")),
        "max_steps": first_integer(trained.get("max_steps")) or None,
        "is_trained": is_trained,
        "settings": settings,
        "environment": environment,
        "settings_digest": atomic_dir.file_digest(directory.settings) if directory.settings.is_file() else "",
        **training,
    }
    _check_same_model(directory, evaluations, trained)
    run["missing"] = replace_unprintable(_missing(run, evaluations, facts, sorted(names - finished)))
    return [run | evaluation for evaluation in evaluations or [{}]]


def training_columns(metrics: pd.DataFrame) -> dict[str, Any]:
    """Return the columns of the runs frame that summarise a training log."""
    steps = metrics[~metrics["is_validation"]]
    finite = steps.replace([np.inf, -np.inf], np.nan)
    tenth = len(steps) // 10
    last, before = finite["loss"].tail(tenth), finite["loss"].tail(2 * tenth).head(tenth)
    return {
        "training_steps": steps["step"].iat[-1] if len(steps) else 0,
        "learned_tokens": int(steps["learned_tokens"].sum()),
        "final_loss": finite["loss"].tail(STEPS_OF_FINAL_LOSS).mean(),
        "late_loss_fall": 1 - last.mean() / before.mean() if tenth else np.nan,
        "tokens_per_second": finite["tokens_per_second"].median(),
        "training_seconds": steps["seconds"].sum(),
        "non_finite_losses": int(finite["loss"].isna().sum()),
    }


def _manifest_facts(directory: RunDirectory) -> dict[str, Any]:
    """Return the facts in the manifest of the export, or of the newest complete checkpoint if there is no export.

    `is_export` is added to the facts. If there is neither an export nor a complete checkpoint, return {}.
    """
    checkpoints = [directory.checkpoint(step) for step in reversed(directory.checkpoint_steps())]
    for path in (directory.export, *checkpoints):
        if atomic_dir.is_complete(path):
            return {**atomic_dir.read_manifest(path)["facts"], "is_export": path == directory.export}
    return {}


def _missing(
    run: dict[str, Any], evaluations: list[dict[str, Any]], facts: dict[str, Any], unfinished: list[str]
) -> str:
    """Return a message that names the run's first unfinished stage; "" if all stages are finished.

    `unfinished`: names of evaluations without results. An evaluated run needs no checkpoint and no export.
    """
    not_evaluated = "" if evaluations else "not evaluated"
    if unfinished:
        not_evaluated = f"evaluation missing: {', '.join(unfinished)}"
    if not run["is_trained"]:
        return not_evaluated
    of_all = f" of {run['max_steps']}" if run["max_steps"] else ""
    stopped = f"training stopped at step {run['training_steps']}{of_all}"
    if not run["training_steps"] and not facts.get("step") and not evaluations:
        return "not started"
    all_stopped = bool(evaluations) and all(row["stopped_at"] is not None for row in evaluations)
    if facts.get("finished") is False or all_stopped:
        return stopped
    if not evaluations and "finished" not in facts:
        return f"{stopped}, no checkpoint"
    if not evaluations and not facts.get("is_export"):
        return "trained, not exported"
    return not_evaluated if unfinished or not is_role_of_pair(run["run_method"]) else ""


def _check_same_model(
    directory: RunDirectory, evaluations: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    """Raise UserError if a run's evaluations are of different models, or if an evaluation contradicts the run's settings."""
    for row in evaluations:
        path = row["results_path"]
        for name, expected in (("method", settings.get("method")), ("train_seed", settings.get("seed"))):
            if expected is not None and row[name] not in (expected, None, ""):  # "" and None: unknown
                raise UserError(
                    f"{path}: {name} is {row[name]!r} but {directory.settings} says {expected!r}; "
                    "the evaluation is of another run, move it or evaluate again"
                )
        for name, column in (("num_parameters", "parameters"), ("model_name", "model"), ("train_data",) * 2):
            value, first = row[f"evaluated_{column}"], evaluations[0][f"evaluated_{column}"]
            if value != first:
                raise UserError(
                    f"{path}: {name} is {value!r} but {evaluations[0]['results_path']} says {first!r}; "
                    "one of the two evaluations is of another run, evaluate again"
                )
