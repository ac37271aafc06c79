"""How the numbers were made: settings, versions, and what a reader should know about single runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.report.analysis import Analyses
from trainer.report.format import clean
from trainer.report.results import Run

# Of environment.json. Hosts, commands and job numbers stay in the run directories: a report is passed around.
_ENVIRONMENT = (
    *("versions", "python", "device", "launcher", "world_size", "threads_per_rank", "zero_stage", "dtype"),
    "code_revision",
)
# Of settings.yaml: what decides the numbers and is not in the run's name. What is off or empty is not shown.
_SETTINGS = (
    *(
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "pack_length",
        "packing",
        "learning_rate",
    ),
    *(
        "lr_scheduler_type",
        "warmup_steps",
        "warmup_ratio",
        "weight_decay",
        "max_grad_norm",
        "num_train_epochs",
    ),
    *("max_steps", "bf16", "learn_calculator_results", "gradient_checkpointing", "deepspeed"),
)
# The same of a run that only answers with other runs' students.
_ASKED = ("subquestions", "guidance_from", "max_steps", "max_new_tokens", "temperature", "dtype")


def shared_facts(runs: Sequence[Run]) -> dict[str, str]:
    """What all started trainings have in common: settings, versions and machine."""
    facts = [_facts(run) for run in runs if (run.settings or run.environment) and not run.only_asked]
    first = facts[0] if facts else {}
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in facts)}


def own_facts(runs: Sequence[Run]) -> list[tuple[Run, dict[str, str]]]:
    """For each run, the facts that not all runs share."""
    shared = shared_facts(runs)
    return [(run, {name: value for name, value in _facts(run).items() if name not in shared}) for run in runs]


def remarks(runs: Sequence[Run], analyses: Analyses) -> list[tuple[str, str]]:
    """(run, what a reader of its numbers should know)."""
    found = []
    for run in runs:
        metrics = run.metrics
        counted = (
            (metrics.broken_lines, "unreadable lines in the training log, cut by a kill and left out"),
            (metrics.undone_steps, "steps undone and trained again after a resume"),
            (metrics.non_finite_losses, "steps without a finite loss"),
        )
        found += [(run.name, f"{text}: {number}") for number, text in counted if number]
        reason = (run.environment.get("layout") or {}).get("fallback_reason")
        if reason:
            found.append((run.name, f"trained with a slower layout of examples: {clean(reason)}"))
        for evaluation in run.evaluations:
            analysis = analyses[evaluation.directory.path]
            notes = list(evaluation.warnings)
            notes += [
                f"the {backend.role} was decoded by the backend {backend.name}: {backend.reason}"
                for backend in evaluation.backends
                if backend.reason
            ]
            notes += [f"answers cut at {clean(why)}: {n}" for why, n in sorted(analysis.stopped.items())]
            if analysis.without_gold_steps:
                notes.append("predictions without gold steps, of an older version: no causes, no quality")
            found += [(f"{run.name}, {clean(evaluation.directory.path.name)}", text) for text in notes]
    return found


def _facts(run: Run) -> dict[str, str]:
    return _made_with(run) | _layout(run) | _decoding(run)


def _layout(run: Run) -> dict[str, str]:
    """Return the layout of a training's examples, and the difference of its logits from the model's own."""
    layout = run.environment.get("layout")
    if run.only_asked or not isinstance(layout, dict):  # of an older version
        return {}
    return {
        "layout of examples": f"{layout['rows']} (attention {layout['attention']})",
        "its logits differ from the plain forward pass's by": f"{layout['largest_difference']:.0e} standard deviations "
        f"(allowed: {layout['tolerance']:.0e}; {layout['compared_examples']} examples, {layout['compared_in']})",
    }


def _decoding(run: Run) -> dict[str, str]:
    """Return the backends that decoded a run's answers, and the largest difference of their logits from the models' own."""
    backends = [backend for evaluation in run.evaluations for backend in evaluation.backends]
    if not backends:
        return {}
    found = {"answers decoded by": ", ".join(sorted({backend.name for backend in backends}))}
    differences = [backend.difference for backend in backends if backend.difference is not None]
    if not differences:
        return found
    return found | {
        "their logits differ from the plain forward pass's by": f"at most {max(differences):.0e} standard deviations",
    }


def _made_with(run: Run) -> dict[str, str]:
    if run.only_asked:
        members = {m.role: f"{m.model_name} ({m.method})" for e in run.evaluations for m in e.members}
        asked = {name: run.settings[name] for name in _ASKED if run.settings.get(name)}
        most = asked.pop("max_steps", None)
        if most and run.settings.get("decomposer"):
            asked["most sub-questions"] = most
        return _flatten(members | asked)
    settings = {name: run.settings[name] for name in _SETTINGS if run.settings.get(name)}
    if "max_steps" in settings:
        settings.pop("num_train_epochs", None)  # max_steps wins
    if "deepspeed" in settings:  # the file; its version is called the same
        settings["DeepSpeed config"] = settings.pop("deepspeed")
    environment = {name: run.environment[name] for name in _ENVIRONMENT if name in run.environment}
    return _flatten(settings) | _flatten(environment)


def _flatten(record: dict[str, Any]) -> dict[str, str]:
    """Nested facts as one level of text."""
    facts: dict[str, str] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            facts |= _flatten(value)
        elif isinstance(value, bool):
            facts[clean(str(name))] = "yes" if value else "no"
        elif isinstance(value, (str, int, float)) and str(value):
            facts[clean(str(name))] = clean(str(value))
    return facts
