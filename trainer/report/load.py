"""Load studies from disk into pandas frames, from which all tables, figures and texts of the report are made.

columns.py documents the frames. Incomplete runs stay in the runs frame; its column `missing` names what they lack.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from trainer.errors import UserError
from trainer.report import columns
from trainer.report.format import clean
from trainer.report.methods import canonical, is_role_of_pair, method_rank
from trainer.report.run_files import RULES, first_integer, read_evaluation, read_json, read_metrics
from trainer.report.statistics import wilson_interval
from trainer.settings import TrainSettings
from trainer.storage import atomic_dir
from trainer.storage.configuration import rename_old_keys
from trainer.storage.run_directory import RunDirectory, StudyDirectory, parse_run_name

STEPS_OF_FINAL_LOSS = 20
_RUN_ORDER = ["study", "run_parameters", "model", "method_rank", "run_seed", "run"]
_EVALUATION_ORDER = ["panel_rank", "parameters", "model", "method_rank", "first_seed", "run", "sampling_seed"]


@dataclass(frozen=True)
class StudyFrames:
    """`runs`: columns.RUNS. `metrics`: columns.METRICS, by run path."""

    runs: pd.DataFrame
    metrics: dict[Path, pd.DataFrame]

    @property
    def evaluations(self) -> pd.DataFrame:
        """Return the rows with an evaluation, by panel, size, model, method and seed."""
        rows = self.runs[self.runs["evaluation_name"].notna()]
        keys = rows.assign(
            method_rank=rows["method"].map(method_rank), first_seed=rows["train_seed"].fillna(0)
        )
        order = keys.sort_values(_EVALUATION_ORDER, kind="stable").index
        return rows.loc[order].reset_index(drop=True)


def load_frames(directories: list[Path]) -> StudyFrames:
    """Load all runs of study directories (or run directories), each once, including runs that are only planned.

    Rows are ordered by study, size, model, method, seed and name. Raises UserError for a directory without runs and
    for results that are unreadable or contradictory.
    """
    metrics: dict[Path, pd.DataFrame] = {}
    rows: list[dict[str, Any]] = []
    for directory, planned in _find_runs(directories):
        log, counts = read_metrics(directory.metrics)
        metrics[directory.path] = log
        rows += _load_run(directory, planned, training_columns(log) | counts)
    models = {parse_run_name(row["run"])[2]: row for row in rows if row["parameters"] is not None}
    for (
        row
    ) in rows:  # stopped before its model was recorded: take name and size from another run of the model
        known = models.get(parse_run_name(row["run"])[2])
        if row["parameters"] is None and known is not None:
            row |= {name: known[name] for name in ("model", "parameters")}
    frame = columns.frame(rows, columns.RUNS)
    for rule in RULES:
        correct, n = frame[[f"{rule}_correct", "n"]].to_numpy(np.float64, na_value=np.nan).T
        frame[f"{rule}_accuracy"] = correct / n
        frame[f"{rule}_low"], frame[f"{rule}_high"] = wilson_interval(correct, n)
    keys = _panel_keys(rows)
    # Panels with fewer remarks come first.
    ranked = sorted({key for key in keys if key}, key=lambda key: (sum(map(bool, key)), key))
    frame["panel"] = [" · ".join(filter(None, key)) if key else None for key in keys]
    frame["panel_rank"] = pd.array([ranked.index(key) if key else None for key in keys], dtype="Int64")
    frame["is_plain"] = [not any(key[2:]) if key else None for key in keys]
    keyed = frame.assign(
        run_parameters=frame["parameters"].fillna(0),
        method_rank=frame["run_method"].map(method_rank),
        run_seed=frame["seed"].fillna(-1),
    )
    return StudyFrames(
        frame.loc[keyed.sort_values(_RUN_ORDER, kind="stable").index].reset_index(drop=True), metrics
    )


def _panel_keys(rows: list[dict[str, Any]]) -> list[tuple[str, ...] | None]:
    """Return for each row the components of its panel's title, None without an evaluation.

    The study is a component only if a run occurs in several studies, the evaluation's name only if a model was
    evaluated twice under the same title.
    """
    paths = {row["run_path"]: row["run"] for row in rows}
    several = len(set(paths.values())) < len(paths)
    keys = [
        (row["study"] if several else "", row["problems"], *row["remarks"])
        if "evaluation_name" in row
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
    """Return whether a directory is a run's and not a study's."""
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
                f"{path} holds no runs (folders with a settings.yaml); train first, or check the path"
            )
        found |= {run.path.resolve(): (run, plan.get(run.name, set())) for run in runs}
    return list(found.values())


def _planned_evaluations(study: StudyDirectory) -> dict[str, set[str]]:
    """Return run -> evaluations of the study's settings; {} without settings."""
    runs = _read_settings(study.settings).get("runs")
    plans = {str(name): plan for name, plan in runs.items()} if isinstance(runs, dict) else {}
    evaluations = {name: plan.get("evaluate") for name, plan in plans.items() if isinstance(plan, dict)}
    return {
        name: set(map(str, found)) if isinstance(found, dict) else set()
        for name, found in evaluations.items()
    }


def _load_run(directory: RunDirectory, planned: set[str], training: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each evaluation of a run, or one row without evaluation; `training` are further columns."""
    name = clean(directory.name)
    settings = _read_settings(directory.settings)
    environment = read_json(directory.environment) if directory.environment.is_file() else {}
    is_trained = "shards" not in settings
    trained = (
        settings if is_trained else {}
    )  # seed and max_steps of an evaluation are not those of a training
    manifest = _manifest_facts(directory)
    facts = environment | manifest
    data, method, model, seed = parse_run_name(name)
    names = {found for found in directory.evaluation_names() if not found.startswith(".")} | planned
    finished = [found for found in sorted(names) if directory.evaluation(found).results.is_file()]
    evaluations = [read_evaluation(directory.evaluation(found), name) for found in finished]
    first = evaluations[0] if evaluations else {}

    def fact(key: str, otherwise: Any) -> str:
        return clean(str(facts.get(key) or otherwise))

    run = {
        "study": clean(directory.path.resolve().parent.name),
        "run": name,
        "run_path": directory.path,
        "train_data": clean(data or str(facts.get("data") or first.get("evaluated_train_data", ""))),
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
    run["missing"] = clean(_missing(run, evaluations, manifest, sorted(names - set(finished))))
    return [run | evaluation for evaluation in evaluations or [{}]]


def training_columns(metrics: pd.DataFrame) -> dict[str, Any]:
    """Return the columns of the runs frame that summarise a training log."""
    steps = metrics[~metrics["is_validation"]]
    finite = steps.replace([np.inf, -np.inf], np.nan)
    q1, median, q3 = finite["tokens_per_second"].quantile([0.25, 0.5, 0.75])
    return {
        "training_steps": steps["step"].iat[-1] if len(steps) else 0,
        "learned_tokens": int(steps["learned_tokens"].sum()),
        "final_loss": finite["loss"].tail(STEPS_OF_FINAL_LOSS).mean(),
        **{"tokens_per_second_q1": q1, "tokens_per_second": median, "tokens_per_second_q3": q3},
        "training_seconds": steps["seconds"].sum(),
        "non_finite_losses": int(finite["loss"].isna().sum()),
    }


def _manifest_facts(directory: RunDirectory) -> dict[str, Any]:
    """Return the facts of the export, or else of the newest complete checkpoint; {} without either."""
    checkpoints = [directory.checkpoint(step) for step in reversed(directory.checkpoint_steps())]
    for path in (directory.export, *checkpoints):
        if atomic_dir.is_complete(path):
            return {**atomic_dir.read_manifest(path)["facts"], "is_export": path == directory.export}
    return {}


def _missing(
    run: dict[str, Any], found: list[dict[str, Any]], facts: dict[str, Any], waiting: list[str]
) -> str:
    """Return the first stage that is not done, in words, "" if all are.

    The results of an evaluated run count even if its checkpoints and export were deleted since.
    """
    not_evaluated = "" if found else "not evaluated"
    if waiting:
        not_evaluated = f"evaluation missing: {', '.join(waiting)}"
    if not run["is_trained"]:
        return not_evaluated
    reached = f"step {run['training_steps']}" + (f" of {run['max_steps']}" if run["max_steps"] else "")
    facts = run["environment"] | facts
    if not run["training_steps"] and not facts.get("step") and not found:
        return "not started"
    if facts.get("finished") is False or (found and all(row["stopped_at"] is not None for row in found)):
        return f"training stopped at {reached}"
    if not found and "finished" not in facts:
        return f"training stopped at {reached}, no checkpoint"
    if not found and not facts.get("is_export"):
        return "trained, not exported"
    return not_evaluated if waiting or not is_role_of_pair(run["run_method"]) else ""


def _check_same_model(directory: RunDirectory, found: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Raise UserError unless all evaluations of a run are of the same model, the one of its settings."""
    for row in found:
        path = row["results_path"]
        for name, expected in (("method", settings.get("method")), ("train_seed", settings.get("seed"))):
            if expected is not None and row[name] not in (expected, None, ""):  # "" and None: not stated
                raise UserError(
                    f"{path}: {name} is {row[name]!r} but {directory.settings} says {expected!r}; "
                    "the evaluation is of another run, move it or evaluate again"
                )
        for name, column in (("num_parameters", "parameters"), ("model_name", "model"), ("train_data",) * 2):
            value, first = row[f"evaluated_{column}"], found[0][f"evaluated_{column}"]
            if value != first:
                raise UserError(
                    f"{path}: {name} is {value!r} but {found[0]['results_path']} says {first!r}; "
                    "one of them is of another run, evaluate again"
                )


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it") from None
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise UserError(
            f"{path} holds a {type(settings).__name__}, expected settings (key: value); restore it"
        )
    rename_old_keys(TrainSettings, settings, str(path))
    return settings
