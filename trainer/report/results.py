"""Everything a study left on disk, read once and checked: runs, their evaluations, and what is unfinished.

What is missing is kept and said, never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError
from trainer.report.evaluations import Evaluation, load_evaluation, read_json, whole
from trainer.report.format import clean
from trainer.report.methods import canonical, is_part
from trainer.report.metrics import Metrics, read_metrics
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory, StudyDirectory, parse_run_name


@dataclass(frozen=True)
class Run:
    """One run directory. Facts that nobody wrote down are "" or None."""

    directory: RunDirectory
    name: str
    study: str
    data: str
    method: str
    model_name: str
    seed: int | None
    num_parameters: int | None
    max_steps: int | None
    metrics: Metrics
    evaluations: tuple[Evaluation, ...]
    environment: dict[str, Any]
    settings: dict[str, Any]
    settings_digest: str
    unfinished: str  # "" or what is missing
    only_asked: bool = False  # not trained here: a pair of other runs' students, or a base model


def load_runs(directories: list[Path]) -> list[Run]:
    """All runs of study directories (or run directories), each once; also those that are planned and not there yet.

    Raises UserError for a directory without runs and for results that are unreadable or contradictory.
    """
    found: dict[Path, tuple[RunDirectory, set[str]]] = {}  # with names of planned evaluations
    for path in directories:
        if not path.is_dir():
            raise UserError(f"{path} is not a directory; name a study directory or a run directory")
        if is_run(path):
            runs, plan = [RunDirectory(path)], _planned(StudyDirectory(path.resolve().parent))
        else:
            study = StudyDirectory(path)
            plan = _planned(study)
            runs = [*study.runs(), *(study.run(name) for name in plan)]
        if not runs:
            raise UserError(
                f"{path} holds no runs (folders with a settings.yaml); train first, or check the path"
            )
        found |= {run.path.resolve(): (run, plan.get(run.name, set())) for run in runs}
    return _name_models([_load_run(run, planned) for run, planned in found.values()])


def is_run(path: Path) -> bool:
    """Whether a directory is a run's and not a study's."""
    return RunDirectory(path).settings.is_file() or RunDirectory(path).metrics.is_file()


def _planned(study: StudyDirectory) -> dict[str, set[str]]:
    """Run -> evaluations, as the study that was started has them; empty if no study wrote its settings down."""
    runs = _read_settings(study.settings).get("runs")
    if not isinstance(runs, dict):
        return {}
    plans = {str(name): plan.get("evaluate") for name, plan in runs.items() if isinstance(plan, dict)}
    return {name: set(map(str, plan)) if isinstance(plan, dict) else set() for name, plan in plans.items()}


def _name_models(runs: list[Run]) -> list[Run]:
    """Give runs that ended before anything wrote their model down the name and size of a sister run's model."""
    known = {parse_run_name(run.name)[2]: run for run in runs if run.num_parameters is not None}

    def named(run: Run) -> Run:
        sister = known.get(parse_run_name(run.name)[2])
        if run.num_parameters is not None or sister is None:
            return run
        return replace(run, model_name=sister.model_name, num_parameters=sister.num_parameters)

    return [named(run) for run in runs]


def _load_run(directory: RunDirectory, planned: set[str]) -> Run:
    name, study = clean(directory.name), clean(directory.path.resolve().parent.name)
    settings = _read_settings(directory.settings)
    environment = read_json(directory.environment) if directory.environment.is_file() else {}
    only_asked = (
        "shards" in settings
    )  # settings of an evaluation: their seed and max_steps are not a training's
    trained = {} if only_asked else settings
    facts = environment | _facts(directory)
    data, method, model_name, seed = parse_run_name(name)
    parts = {part for part in directory.evaluation_names() if not part.startswith(".")} | planned
    there = [part for part in sorted(parts) if directory.evaluation(part).results.is_file()]
    evaluations = [load_evaluation(directory.evaluation(part), name, study) for part in there]
    first = evaluations[0] if evaluations else None

    def said(fact: str, otherwise: Any) -> str:
        return clean(str(facts.get(fact) or otherwise))

    run = Run(
        directory=directory,
        name=name,
        study=study,
        data=clean(data or str(facts.get("data") or (first.train_data if first else ""))),
        method=first.method if first else canonical(said("method", trained.get("method") or method)),
        model_name=first.model_name
        if first
        else said("model_name", trained.get("model_label") or model_name or name),
        seed=whole(first and first.train_seed, facts.get("seed"), trained.get("seed"), seed),
        num_parameters=first.num_parameters if first else whole(facts.get("num_parameters")),
        max_steps=whole(trained.get("max_steps")) or None,
        metrics=read_metrics(directory.metrics),
        evaluations=tuple(evaluations),
        environment=environment,
        settings=settings,
        settings_digest=atomic_dir.file_digest(directory.settings) if directory.settings.is_file() else "",
        unfinished="",
        only_asked=only_asked,
    )
    _refuse_mixed_evaluations(run, trained)
    return replace(run, unfinished=clean(_what_is_missing(run, facts, sorted(parts - set(there)))))


def _facts(directory: RunDirectory) -> dict[str, Any]:
    """What the export, or else the newest finished checkpoint, says about its student; {} without either."""
    checkpoints = [directory.checkpoint(step) for step in reversed(directory.checkpoint_steps())]
    for path in (directory.export, *checkpoints):
        if atomic_dir.is_complete(path):
            return {**atomic_dir.read_manifest(path)["facts"], "is_export": path == directory.export}
    return {}


def _what_is_missing(run: Run, facts: dict[str, Any], waiting: list[str]) -> str:
    """In words, the first stage that is not done; "" if everything is.

    Evaluated runs may have lost their checkpoints and export since: their results are what counts.
    """
    if run.only_asked:
        if waiting:
            return f"evaluation missing: {', '.join(waiting)}"
        return "" if run.evaluations else "not evaluated"
    reached = f"step {run.metrics.last_step}" + (f" of {run.max_steps}" if run.max_steps else "")
    if not len(run.metrics.steps) and not facts.get("step") and not run.evaluations:
        return "not started"
    stopped = [evaluation.stopped_at is not None for evaluation in run.evaluations]
    if facts.get("finished") is False or (stopped and all(stopped)):
        return f"training stopped at {reached}"
    if not run.evaluations and "finished" not in facts:
        return f"training stopped at {reached}, no checkpoint"
    if not run.evaluations and not facts.get("is_export"):
        return "trained, not exported"
    if waiting:
        return f"evaluation missing: {', '.join(waiting)}"
    return "" if run.evaluations or is_part(run.method) else "not evaluated"


def _refuse_mixed_evaluations(run: Run, settings: dict[str, Any]) -> None:
    """All evaluations of a run are of one student, the one its settings name."""
    for evaluation in run.evaluations:
        path = evaluation.directory.results
        for name, mine in (("method", settings.get("method")), ("train_seed", settings.get("seed"))):
            theirs = getattr(evaluation, name)
            if mine is not None and theirs not in (mine, None, ""):  # "" and None: the student does not say
                raise UserError(
                    f"{path}: {name} is {theirs!r} but {run.directory.settings} says {mine!r}; "
                    "the evaluation is of another run, move it or evaluate again"
                )
        for name in ("num_parameters", "model_name", "train_data"):
            first = run.evaluations[0]
            if getattr(evaluation, name) != getattr(first, name):
                raise UserError(
                    f"{path}: {name} is {getattr(evaluation, name)!r} but {first.directory.results} says "
                    f"{getattr(first, name)!r}; one of them is of another run, evaluate again"
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
    return settings or {}
