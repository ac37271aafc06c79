"""Load studies from disk into pandas frames; every table, figure and text of the report is made from these.

columns.py documents the frames. Missing parts of a study stay in the runs frame and are named in its column `missing`.
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
from trainer.report.methods import canonical, is_part, method_rank
from trainer.report.run_files import RULES, first_integer, read_evaluation, read_json, read_metrics
from trainer.report.statistics import wilson_interval
from trainer.settings import TrainSettings
from trainer.storage import atomic_dir
from trainer.storage.configuration import rename_old_keys
from trainer.storage.run_directory import RunDirectory, StudyDirectory, parse_run_name

STEPS_OF_FINAL_LOSS = 20


@dataclass(frozen=True)
class Study:
    """`runs`: columns.RUNS. `metrics`: columns.METRICS, by run path."""

    runs: pd.DataFrame
    metrics: dict[Path, pd.DataFrame]

    @property
    def evaluations(self) -> pd.DataFrame:
        """Return the rows with an evaluation, by panel, size, model, method and seed."""
        rows = self.runs[self.runs["evaluation_name"].notna()]
        keys = rows.assign(rank=rows["method"].map(method_rank), first_seed=rows["train_seed"].fillna(0))
        order = ["panel_rank", "parameters", "model", "rank", "first_seed", "run", "sampling_seed"]
        return rows.loc[keys.sort_values(order, kind="stable").index].reset_index(drop=True)


def load_frames(directories: list[Path]) -> Study:
    """Load all runs of study directories (or run directories), each once, also those that are planned only.

    Rows are ordered by study, size, model, method, seed and name. Raises UserError for a directory without runs and
    for results that are unreadable or contradictory.
    """
    loaded = [_load_run(directory, planned) for directory, planned in _find_runs(directories)]
    runs = [run for run, _, _ in loaded]
    known = {parse_run_name(run["run"])[2]: run for run in runs if run["parameters"] is not None}
    for run in runs:  # stopped before its model was written down: name and size of a sister run's model
        sister = known.get(parse_run_name(run["run"])[2])
        if run["parameters"] is None and sister is not None:
            run |= {name: sister[name] for name in ("model", "parameters")}
    loaded.sort(key=lambda item: _run_order(item[0]))
    rows = [run | row for run, found, _ in loaded for row in found or [{}]]
    frame = columns.frame(rows, columns.RUNS)
    for rule in RULES:
        correct, n = frame[[f"{rule}_correct", "n"]].to_numpy(np.float64, na_value=np.nan).T
        frame[f"{rule}_accuracy"] = correct / n
        frame[f"{rule}_low"], frame[f"{rule}_high"] = wilson_interval(correct, n)
    keys = _panel_keys(rows)
    # The plain case first: panels with fewer remarks.
    ranked = sorted({key for key in keys if key}, key=lambda key: (sum(map(bool, key)), key))
    frame["panel"] = [" · ".join(filter(None, key)) if key else None for key in keys]
    frame["panel_rank"] = pd.array([ranked.index(key) if key else None for key in keys], dtype="Int64")
    frame["is_plain"] = [not any(key[2:]) if key else None for key in keys]
    return Study(frame, {run["run_path"]: metrics for run, _, metrics in loaded})


def _run_order(run: dict[str, Any]) -> tuple[Any, ...]:
    seed = -1 if run["seed"] is None else run["seed"]
    method = method_rank(run["run_method"])
    return run["study"], run["parameters"] or 0, run["model"], method, seed, run["run"]


def _panel_keys(rows: list[dict[str, Any]]) -> list[tuple[str, ...] | None]:
    """Return for each row the parts of its panel's title, None without an evaluation.

    Studies are kept apart only where a run occurs in more than one. If one student was asked twice in ways that the
    title does not separate, the evaluation's name does.
    """
    paths = {row["run_path"]: row["run"] for row in rows}
    several = len(set(paths.values())) < len(paths)
    keys: list[Any] = [
        (row["study"] if several else "", row["problems"], *row["remarks"])
        if "evaluation_name" in row
        else None
        for row in rows
    ]
    asked = pd.DataFrame(
        [(key, row["run"], row.get("sampling_seed")) for key, row in zip(keys, rows, strict=True)],
        columns=["key", "run", "seed"],
    ).duplicated(keep=False)
    return [
        key and (*key, row["evaluation_name"] if twice else "")
        for key, row, twice in zip(keys, rows, asked, strict=True)
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
        plan = _planned(study)
        runs = [RunDirectory(path)] if is_run(path) else [*study.runs(), *map(study.run, plan)]
        if not runs:
            raise UserError(
                f"{path} holds no runs (folders with a settings.yaml); train first, or check the path"
            )
        found |= {run.path.resolve(): (run, plan.get(run.name, set())) for run in runs}
    return list(found.values())


def _planned(study: StudyDirectory) -> dict[str, set[str]]:
    """Return run -> evaluations of a study's settings; {} if the study wrote none."""
    runs = _read_settings(study.settings).get("runs")
    planned = {}
    for name, plan in runs.items() if isinstance(runs, dict) else ():
        if isinstance(plan, dict):
            evaluations = plan.get("evaluate")
            planned[str(name)] = set(map(str, evaluations)) if isinstance(evaluations, dict) else set()
    return planned


def _load_run(
    directory: RunDirectory, planned: set[str]
) -> tuple[dict[str, Any], list[dict[str, Any]], pd.DataFrame]:
    """Return the run's columns, the columns of each evaluation, and its metrics."""
    name = clean(directory.name)
    settings = _read_settings(directory.settings)
    environment = read_json(directory.environment) if directory.environment.is_file() else {}
    is_trained = "shards" not in settings
    trained = settings if is_trained else {}  # seed and max_steps of an evaluation are not a training's
    manifest = _manifest_facts(directory)
    facts = environment | manifest
    data, method, model, seed = parse_run_name(name)
    names = {part for part in directory.evaluation_names() if not part.startswith(".")} | planned
    there = [part for part in sorted(names) if directory.evaluation(part).results.is_file()]
    evaluations = [read_evaluation(directory.evaluation(part), name) for part in there]
    first = evaluations[0] if evaluations else {}
    metrics, counts = read_metrics(directory.metrics)

    def stated(fact: str, otherwise: Any) -> str:
        return clean(str(facts.get(fact) or otherwise))

    run = {
        "study": clean(directory.path.resolve().parent.name),
        "run": name,
        "run_path": directory.path,
        "train_data": clean(data or str(facts.get("data") or first.get("evaluated_train_data", ""))),
        "run_method": first.get("method") or canonical(stated("method", trained.get("method") or method)),
        "model": first.get("evaluated_model")
        or stated("model_name", trained.get("model_label") or model or name),
        "seed": first_integer(first.get("train_seed"), facts.get("seed"), trained.get("seed"), seed),
        "parameters": first_integer(first.get("evaluated_parameters"), facts.get("num_parameters")),
        "max_steps": first_integer(trained.get("max_steps")) or None,
        "is_trained": is_trained,
        "settings": settings,
        "environment": environment,
        "settings_digest": atomic_dir.file_digest(directory.settings) if directory.settings.is_file() else "",
        **training_columns(metrics),
        **counts,
    }
    _check_one_student(directory, evaluations, trained)
    run["missing"] = clean(_missing(run, evaluations, manifest, sorted(names - set(there))))
    return run, evaluations, metrics


def training_columns(metrics: pd.DataFrame) -> dict[str, Any]:
    """Return what the runs frame states about a training log."""
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
    """Return what the export, or else the newest finished checkpoint, states; {} without either."""
    checkpoints = [directory.checkpoint(step) for step in reversed(directory.checkpoint_steps())]
    for path in (directory.export, *checkpoints):
        if atomic_dir.is_complete(path):
            return {**atomic_dir.read_manifest(path)["facts"], "is_export": path == directory.export}
    return {}


def _missing(
    run: dict[str, Any], found: list[dict[str, Any]], facts: dict[str, Any], waiting: list[str]
) -> str:
    """Return in words the first stage that is not done, "" if everything is.

    Evaluated runs may have lost their checkpoints and export since: their results count.
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
    return not_evaluated if waiting or not is_part(run["run_method"]) else ""


def _check_one_student(
    directory: RunDirectory, found: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    """Raise UserError unless all evaluations of a run are of one student, the one its settings name."""
    for row in found:
        path = row["results_path"]
        for name, mine in (("method", settings.get("method")), ("train_seed", settings.get("seed"))):
            if mine is not None and row[name] not in (mine, None, ""):  # "" and None: not stated
                raise UserError(
                    f"{path}: {name} is {row[name]!r} but {directory.settings} says {mine!r}; "
                    "the evaluation is of another run, move it or evaluate again"
                )
        for name, column in (("num_parameters", "parameters"), ("model_name", "model"), ("train_data",) * 2):
            theirs, first = row[f"evaluated_{column}"], found[0][f"evaluated_{column}"]
            if theirs != first:
                raise UserError(
                    f"{path}: {name} is {theirs!r} but {found[0]['results_path']} says {first!r}; "
                    "one of them is of another run, evaluate again"
                )


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it") from None
    if settings is not None and not isinstance(settings, dict):
        raise UserError(
            f"{path} holds a {type(settings).__name__}, expected settings (key: value); restore it"
        )
    settings = settings or {}
    rename_old_keys(TrainSettings, settings, str(path))
    return settings
