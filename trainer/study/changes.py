"""Check that existing runs were made with the settings in the study file. New runs may be added to the file.

`study.yaml` in the study's directory holds the settings with which each run was started.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError
from trainer.settings import TrainSettings
from trainer.storage import atomic_dir
from trainer.storage.configuration import rename_old_keys
from trainer.storage.run_directory import StudyDirectory
from trainer.study.status import has_work, is_evaluated
from trainer.study.study_file import RunSpec, Study

_FORMAT = 1
# Settings that do not affect the result, such as paths, intervals and concurrency.
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
    """Raise UserError if settings of runs with checkpoints or results have changed. The message names runs and keys."""
    snapshot, current = _read(study.directory), _records(study)
    changed = []
    for run in study.runs:
        old, new = snapshot.get(run.name), current[run.name]
        if old is None or not has_work(run.directory):
            continue
        sections = [("", old["train"], new["train"], _WITHOUT_EFFECT_ON_TRAINING)]
        evaluated = [Path(e.output_dir).name for e in run.evaluations if is_evaluated(e)]
        # Check the training of a pair's models here too: the models' own run directories may already be deleted.
        for name, training in new["students"].items() if evaluated else ():
            old_training = old.get("students", {}).get(name, {})
            sections.append((f"{name}: ", old_training, training, _WITHOUT_EFFECT_ON_TRAINING))
        for name in evaluated:
            old_evaluation, evaluation = old["evaluate"].get(name, {}), new["evaluate"][name]
            sections.append((f"evaluate {name}: ", old_evaluation, evaluation, _WITHOUT_EFFECT_ON_EVALUATION))
        # Compare only keys that old and new settings share, because other versions of the trainer have other settings.
        differences = [
            f"{prefix}{key} was {before[key]!r}, is now {after[key]!r}"
            for prefix, before, after, without_effect in sections
            for key in after
            if key in before and key not in without_effect and before[key] != after[key]
        ]
        if differences:
            changed.append(f"  {run.directory.path}: {'; '.join(differences)}")
    if changed:
        lines = [f"{study.file} has changed since these runs were made:", *changed[:_MAX_LISTED_RUNS]]
        if len(changed) > _MAX_LISTED_RUNS:
            lines.append(f"  and {len(changed) - _MAX_LISTED_RUNS} more runs")
        remedy = f"Give the study another name ('study: {study.name}-2'), or delete these runs, or undo the change."
        raise UserError("\n".join([*lines, remedy]))


def save_snapshot(study: Study) -> None:
    """Write to study.yaml the settings of every run that the study file lists. Records of other runs are kept."""
    records = {**_read(study.directory), **_records(study)}
    record = {"format": _FORMAT, "file": str(study.file), "runs": dict(sorted(records.items()))}
    atomic_dir.write_text(study.directory.settings, yaml.safe_dump(record, sort_keys=False))


def unlisted_runs(study: Study) -> list[str]:
    """Return the names of runs that are on disk but not in the study file. The report includes these runs."""
    listed = {run.name for run in study.runs}
    return [run.name for run in study.directory.runs() if run.name not in listed]


def _records(study: Study) -> dict[str, dict[str, Any]]:
    """Return {run name: settings of the run}. Key `students`: training settings of the models in a pair."""
    training = {run.name: _training_record(run, study) for run in study.runs}
    return {
        run.name: {
            "train": training[run.name],
            "students": {name: training[name] for name in run.trained_runs},
            "evaluate": {Path(e.output_dir).name: asdict(e) for e in run.evaluations},
        }
        for run in study.runs
    }


def _training_record(run: RunSpec, study: Study) -> dict[str, Any]:
    if run.train is None:
        return {}
    train = {**asdict(run.train), "num_ranks": run.num_ranks}
    if run.train.deepspeed:
        train["deepspeed_digest"] = atomic_dir.file_digest(Path(run.train.deepspeed))
    for problems in study.problem_sets:
        if problems.annotate and problems.shards.output_dir == run.train.train_shards:
            train |= {f"annotate.{key}": value for key, value in asdict(problems.annotate).items()}
    return train


def _read(directory: StudyDirectory) -> dict[str, Any]:
    path = directory.settings
    if not path.is_file():
        return {}
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            raise UserError(f"{path} has format {record['format']!r}, but this version reads {_FORMAT}")
        runs = dict(record["runs"])
        for run in runs.values():
            for settings in (run["train"], *run.get("students", {}).values()):
                rename_old_keys(TrainSettings, settings, str(path))
        return runs
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); delete it to skip this check") from None
