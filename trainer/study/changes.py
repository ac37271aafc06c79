"""Check that a study file still has the settings with which its finished work was made; runs may be added.

`study.yaml` in the study's directory keeps the settings with which every run was started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError
from trainer.settings import TrainSettings
from trainer.storage import atomic_dir
from trainer.storage.configuration import rename_old_keys, to_dict
from trainer.storage.run_directory import StudyDirectory
from trainer.study.status import has_work, is_evaluated
from trainer.study.study_file import RunSpec, Study

_FORMAT = 1
# Settings that do not affect the result: paths, intervals, concurrency.
_WITHOUT_EFFECT_ON_TRAINING = {
    *("output_dir", "train_shards", "eval_shards", "save_steps", "save_total_limit"),
    *("report_to", "wandb_project", "timeout_seconds"),
    *("time_limit_seconds", "max_restarts"),
    *("annotate.output_dir", "annotate.base_url", "annotate.batch_size", "annotate.concurrency"),
    *("annotate.requests_per_minute", "annotate.timeout_seconds", "annotate.max_attempts"),
    *("annotate.retry_seconds", "annotate.allow_unanswered", "annotate.token_limit_field"),
    *("annotate.price_per_million_input", "annotate.price_per_million_output"),
}
_WITHOUT_EFFECT_ON_EVALUATION = {
    *("output_dir", "model_name_or_path", "decomposer", "solver", "planner"),
    *("shards", "batch_size", "backend", "max_restarts"),
}
_MAX_LISTED_RUNS = 6


def check_unchanged(study: Study) -> None:
    """Raise UserError naming runs and keys if finished work was made with settings other than the file's."""
    snapshot, current = _read(study.directory), _records(study)
    changed = []
    for run in study.runs:
        old = snapshot.get(run.name)
        if old is None or not has_work(run.directory):
            continue
        now = current[run.name]
        differences = _differences("", old["train"], now["train"], _WITHOUT_EFFECT_ON_TRAINING)
        evaluated = [Path(e.output_dir).name for e in run.evaluations if is_evaluated(e)]
        # The models' settings affect a pair's results even after their run directories are deleted.
        for name in now["students"] if evaluated else ():
            before = old.get("students", {}).get(name, {})
            differences += _differences(
                f"{name}: ", before, now["students"][name], _WITHOUT_EFFECT_ON_TRAINING
            )
        for name in evaluated:
            before = old["evaluate"].get(name, {})
            differences += _differences(
                f"evaluate {name}: ", before, now["evaluate"][name], _WITHOUT_EFFECT_ON_EVALUATION
            )
        if differences:
            changed.append(f"  {run.directory.path}: {'; '.join(differences)}")
    if changed:
        lines = [f"{study.file} has changed since these runs were made:", *changed[:_MAX_LISTED_RUNS]]
        if len(changed) > _MAX_LISTED_RUNS:
            lines.append(f"  and {len(changed) - _MAX_LISTED_RUNS} more runs")
        remedy = f"Give the study another name ('study: {study.name}-2'), or delete these runs, or undo the change."
        raise UserError("\n".join([*lines, remedy]))


def save_snapshot(study: Study) -> None:
    """Write the settings of all runs to study.yaml. Runs that are no longer in the file keep their record."""
    records = {**_read(study.directory), **_records(study)}
    record = {"format": _FORMAT, "file": str(study.file), "runs": dict(sorted(records.items()))}
    atomic_dir.write_text(study.directory.settings, yaml.safe_dump(record, sort_keys=False))


def unlisted_runs(study: Study) -> list[str]:
    """Return names of runs on disk that are not in the study file; the report includes them."""
    listed = {run.name for run in study.runs}
    return [run.name for run in study.directory.runs() if run.name not in listed]


def _records(study: Study) -> dict[str, dict[str, Any]]:
    """Return, by run, all settings that affect its results, with those of the trained models that it evaluates."""
    training = {run.name: _training_record(run, study) for run in study.runs}
    return {
        run.name: {
            "train": training[run.name],
            "students": {name: training[name] for name in run.trained_runs},
            "evaluate": {Path(e.output_dir).name: to_dict(e) for e in run.evaluations},
        }
        for run in study.runs
    }


def _training_record(run: RunSpec, study: Study) -> dict[str, Any]:
    if run.train is None:
        return {}
    train = {**to_dict(run.train), "num_ranks": run.num_ranks}
    if run.train.deepspeed:
        train["deepspeed_digest"] = atomic_dir.file_digest(Path(run.train.deepspeed))
    for problems in study.problem_sets:
        if problems.annotate and problems.shards.output_dir == run.train.train_shards:
            train |= {f"annotate.{key}": value for key, value in to_dict(problems.annotate).items()}
    return train


def _differences(
    prefix: str, old: dict[str, Any], now: dict[str, Any], without_effect: set[str]
) -> list[str]:
    """Compare keys that both sides have: settings are added and removed between versions of the trainer."""
    keys = [key for key in now if key in old and key not in without_effect and old[key] != now[key]]
    return [f"{prefix}{key} was {old[key]!r}, is now {now[key]!r}" for key in keys]


def _read(directory: StudyDirectory) -> dict[str, Any]:
    path = directory.settings
    if not path.is_file():
        return {}
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            raise UserError(
                f"{path} has format {record['format']!r}, expected {_FORMAT}: written by another version"
            )
        runs = dict(record["runs"])
        for run in runs.values():
            for settings in (run["train"], *run.get("students", {}).values()):
                rename_old_keys(TrainSettings, settings, str(path))
        return runs
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}); delete it to continue without this check"
        ) from None
