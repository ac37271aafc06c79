"""How the numbers were made: settings, versions, and what a reader should know about single runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from trainer.report.results import Run
from trainer.settings import TrainSettings

# Of environment.json. Hosts, commands and job numbers stay in the run directories: a report is passed around.
_ENVIRONMENT = (
    *("versions", "python", "device", "launcher", "world_size", "threads_per_rank", "zero_stage", "dtype"),
    "code_revision",
)
# Of settings.yaml: these name the run (the tables have them), say where things are, or change no number.
_NOT_SHOWN = {
    *("method", "seed", "model_label", "config_name", "model_name_or_path", "config_overrides"),
    *("output_dir", "train_shards", "eval_shards", "resume_from_checkpoint", "overwrite_output_dir"),
    *("report_to", "wandb_project", "timeout_seconds", "save_steps", "save_total_limit"),
}


def shared_facts(runs: Sequence[Run]) -> dict[str, str]:
    """What all started runs have in common: settings that are not at their default, versions and machine."""
    facts = [_facts(run) for run in runs if run.settings or run.environment]
    first = facts[0] if facts else {}
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in facts)}


def own_facts(runs: Sequence[Run]) -> list[tuple[Run, dict[str, str]]]:
    """For each run, the facts that not all runs share."""
    shared = shared_facts(runs)
    return [(run, {name: value for name, value in _facts(run).items() if name not in shared}) for run in runs]


def remarks(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(run, what a reader of its numbers should know)."""
    found = []
    for run in runs:
        metrics = run.metrics
        counted = (
            (
                metrics.broken_lines,
                "unreadable line(s) in the training log, left out (cut by a kill while writing)",
            ),
            (
                metrics.undone_steps,
                "step(s) undone and trained again after a resume; the last line of each counts",
            ),
            (metrics.non_finite_losses, "step(s) without a finite loss"),
        )
        found += [(run.name, f"{number} {text}") for number, text in counted if number]
        for evaluation in run.evaluations:
            found += [(f"{run.name}, {evaluation.directory.path.name}", text) for text in evaluation.warnings]
    return found


def _facts(run: Run) -> dict[str, str]:
    defaults = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
    settings = {
        name: value
        for name, value in run.settings.items()
        if name not in _NOT_SHOWN and value != defaults.get(name)
    }
    environment = {name: run.environment[name] for name in _ENVIRONMENT if name in run.environment}
    return _flatten(settings) | _flatten(environment)


def _flatten(record: dict[str, Any]) -> dict[str, str]:
    """Nested facts as one level of text."""
    facts: dict[str, str] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            facts |= _flatten(value)
        elif isinstance(value, (str, int, float)) and str(value):
            facts[str(name)] = str(value)
    return facts
