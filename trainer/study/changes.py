"""A study is one experiment: its file may gain runs, but may not change what finished work was made with.

`study.yaml` in the study's directory keeps the settings every run was started with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError
from trainer.storage import atomic_dir
from trainer.storage.configuration import to_dict
from trainer.storage.run_directory import StudyDirectory
from trainer.study.status import has_work, is_evaluated
from trainer.study.study_file import RunSpec, Study, evaluation_name

_FORMAT = 1
# Settings that leave the result as it is: where, how often, how many at a time.
_HARMLESS_TO_TRAIN = {
    *("output_dir", "train_shards", "eval_shards", "save_steps", "save_total_limit"),
    *("report_to", "wandb_project", "timeout_seconds"),
    *("time_limit_seconds", "max_restarts"),
    *("annotate.output_dir", "annotate.base_url", "annotate.batch_size", "annotate.concurrency"),
    *("annotate.requests_per_minute", "annotate.timeout_seconds", "annotate.max_attempts"),
    *("annotate.retry_seconds", "annotate.allow_unanswered", "annotate.token_limit_field"),
    *("annotate.price_per_million_input", "annotate.price_per_million_output"),
}
_HARMLESS_TO_EVALUATE = {
    *("output_dir", "model_name_or_path", "decomposer", "solver", "planner"),
    *("shards", "batch_size", "backend", "max_restarts"),
}
_MAX_NAMED = 6


def check_unchanged(study: Study) -> None:
    """Raise UserError naming runs and keys if finished work was made with other settings than the file's now."""
    before, now_all = _read(study.directory), _records(study)
    told = []
    for run in study.runs:
        old = before.get(run.name)
        if old is None or not has_work(run.directory):
            continue
        now = now_all[run.name]
        differences = _differences(old["train"], now["train"], _HARMLESS_TO_TRAIN)
        if any(is_evaluated(settings) for settings in run.evaluations):
            differences += _of_students(old.get("students", {}), now["students"])
        for settings in run.evaluations:
            name = evaluation_name(settings)
            if is_evaluated(settings) and name in old["evaluate"]:
                found = _differences(old["evaluate"][name], now["evaluate"][name], _HARMLESS_TO_EVALUATE)
                differences += [f"evaluate {name}: {difference}" for difference in found]
        if differences:
            told.append(f"  {run.directory.path}: {'; '.join(differences)}")
    if told:
        more = [f"  and {len(told) - _MAX_NAMED} more runs"] if len(told) > _MAX_NAMED else []
        raise UserError(
            "\n".join(
                [
                    f"{study.file} has changed since these runs were made:",
                    *told[:_MAX_NAMED],
                    *more,
                    f"Give the study another name ('study: {study.name}-2'), or delete these runs, or undo the change.",
                ]
            )
        )


def save_snapshot(study: Study) -> None:
    """Write down what the runs are made with. Runs that are no longer in the file keep their record."""
    records = {**_read(study.directory), **_records(study)}
    record = {"format": _FORMAT, "file": str(study.file), "runs": dict(sorted(records.items()))}
    atomic_dir.write_text(study.directory.settings, yaml.safe_dump(record, sort_keys=False))


def unlisted_runs(study: Study) -> list[str]:
    """Runs on disk that the file does not name (any more); the report shows them too."""
    known = {run.name for run in study.runs}
    return [run.name for run in study.directory.runs() if run.name not in known]


def _records(study: Study) -> dict[str, dict[str, Any]]:
    """Everything that decides each run's numbers, those of the students it asks, and the paths for a reader."""
    training = {run.name: _training(run, study) for run in study.runs}
    return {
        run.name: {
            "train": training[run.name],
            "students": {name: training[name] for name in run.students},
            "evaluate": {evaluation_name(settings): to_dict(settings) for settings in run.evaluations},
        }
        for run in study.runs
    }


def _training(run: RunSpec, study: Study) -> dict[str, Any]:
    if run.train is None:
        return {}
    train = {**to_dict(run.train), "num_ranks": run.num_ranks}
    if run.train.deepspeed:
        train["deepspeed_digest"] = atomic_dir.file_digest(Path(run.train.deepspeed))
    for problems in study.problem_sets:
        if problems.annotate and problems.shards.output_dir == run.train.train_shards:
            train |= {f"annotate.{key}": value for key, value in to_dict(problems.annotate).items()}
    return train


def _of_students(old: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A pair's answers are those of its students, also when the students' own directories are gone."""
    return [
        f"{name}: {difference}"
        for name in now
        for difference in _differences(old.get(name, {}), now[name], _HARMLESS_TO_TRAIN)
    ]


def _differences(old: dict[str, Any], now: dict[str, Any], harmless: set[str]) -> list[str]:
    """A key that only one side has is a setting that the trainer gained or lost meanwhile: no difference."""
    keys = [key for key in now if key in old and key not in harmless and old[key] != now[key]]
    return [f"{key} was {old[key]!r}, is now {now[key]!r}" for key in keys]


def _read(directory: StudyDirectory) -> dict[str, Any]:
    path = directory.settings
    if not path.is_file():
        return {}
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            raise UserError(
                f"{path} has format {record['format']!r}, expected {_FORMAT}: made by another version"
            )
        return dict(record["runs"])
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}); delete it to go on without its check"
        ) from None
