"""Tables of a study's plan and progress. The data are read from disk, without a network."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from trainer.errors import UserError
from trainer.models import presets
from trainer.runtime import directory_lock, terminal
from trainer.settings import EvaluateSettings, PrepareSettings, TrainSettings
from trainer.storage import atomic_dir
from trainer.storage.run_directory import EvaluationDirectory
from trainer.study import changes, processes, stages, status
from trainer.study.expand import evaluation_variant
from trainer.study.study_file import RunSpec, Study


def show_status(study: Study) -> None:
    """Print the progress of every run, its loss and its strict accuracies with their 95 % intervals."""
    variants = list(dict.fromkeys(evaluation_variant(e) for run in study.runs for e in run.evaluations))
    table = make_table("run", "train", "loss", "convert", *variants)
    for run in study.runs:
        training = _training(run) if run.train else ("", "", "")
        cells = {evaluation_variant(settings): _evaluation(settings) for settings in run.evaluations}
        table.add_row(run.name, *training, *(cells.get(name, "") for name in variants))
    todo = stages.study_stages(study)
    done = sum(status.is_done(stage) for stage in todo)
    terminal.info(f"study {study.name} ({study.directory.path}): {done} of {len(todo)} stages done")
    for settings in study.prepare_settings:
        is_ready = status.are_shards_ready(settings)
        text = f"{_facts(settings.output_dir)['num_problems']} problems" if is_ready else "not prepared"
        terminal.info(f"shards {settings.output_dir}: {text}")
    terminal.info(terminal.table_text(table))
    if owner := directory_lock.current_owner(study.directory.lock):
        terminal.info(f"in use: {owner.process}, since {owner.since}")
    elif leftovers := processes.processes_of_study(study.directory):
        pids = ", ".join(str(process.pid) for process in leftovers)
        terminal.info(f"not running, but processes {pids} of an earlier start are alive; a run ends them")
    if status.is_done(todo[-1]):
        terminal.info(f"report: {study.directory.report / 'index.html'}")


def print_dry_run(study: Study, scripts_dir: Path | None) -> None:
    """Print the models, all stages, and the commands of the stages that are not done.

    Raises UserError if settings of runs with checkpoints or results have changed.
    """
    changes.check_unchanged(study)
    todo = stages.study_stages(study)
    waiting = [stage for stage in todo if not status.is_done(stage)]
    terminal.info(terminal.table_text(_models(study)) + "\n")
    table = make_table("", "stage", "state", "ranks", "problems")
    for number, stage in enumerate(todo, 1):
        ready = "to do" if stage in waiting else "done"
        table.add_row(str(number), stage.label, ready, str(stage.num_ranks), _stage_problems(stage, study))
    terminal.info(terminal.table_text(table))
    terminal.info(f"study {study.name}: {len(study.runs)} runs, {len(todo)} stages, {len(waiting)} to do")
    for stage in waiting:
        terminal.info("\n" + shlex.join(stages.stage_command(stage, scripts_dir, study.launcher)))


def _models(study: Study) -> Table:
    """Return a table of the models. A `?` is a number that cannot be determined from the files on this machine."""
    table = make_table("model", "from", "parameters", "ranks", "deepspeed", "dtype")
    prepared = {settings.output_dir: settings for settings in study.prepare_settings}
    labels = set()
    for run in study.runs:
        settings = run.train
        if settings and settings.model_label not in labels:
            labels.add(settings.model_label)
            table.add_row(
                settings.model_label,
                settings.model_name_or_path or f"{settings.config_name} (random weights)",
                _number(num_parameters(settings, prepared[settings.train_shards])),
                str(run.num_ranks),
                Path(settings.deepspeed).stem if settings.deepspeed else "zero1",
                "bf16" if settings.bf16 else "fp32",
            )
    return table


def _stage_problems(stage: stages.Stage, study: Study) -> str:
    """Return the number of problems that a stage prepares, trains on or evaluates; "?" if unknown, "" for other stages."""
    if stage.kind == "prepare":
        return _number(num_problems(stage.settings))
    if stage.kind == "train":
        return _number(num_examples(stage.settings, study.prepare_settings))
    return _number(num_answers(stage.settings, study.prepare_settings)) if stage.kind == "evaluate" else ""


def num_problems(settings: PrepareSettings) -> int | None:
    """Return the number of problems in a shard directory; None if there is no directory and the data are not stories."""
    if facts := _facts(settings.output_dir):
        return int(facts["num_problems"])
    if settings.data == "stories":
        return min(settings.max_problems or settings.num_problems, settings.num_problems)
    return None


def num_examples(training: TrainSettings, shards: Iterable[PrepareSettings]) -> int | None:
    """Return the number of training examples; None if unknown. Before the shards exist, all problems count as examples."""
    facts = _facts(training.train_shards)
    if "problems_per_method" in facts:
        return int(facts["problems_per_method"].get(training.method, 0))
    return _num_problems_in(training.train_shards, shards)


def num_answers(evaluation: EvaluateSettings, shards: Iterable[PrepareSettings]) -> int | None:
    """Return the number of problems that an evaluation answers; None if unknown."""
    available = _num_problems_in(evaluation.shards, shards)
    return available and min(evaluation.max_problems or available, available)


def _num_problems_in(path: str, shards: Iterable[PrepareSettings]) -> int | None:
    return next(num_problems(settings) for settings in shards if settings.output_dir == path)


def num_parameters(settings: TrainSettings, prepared: PrepareSettings) -> int | None:
    """Return the number of parameters; None if the config or the vocabulary size is not on this machine."""
    from trainer.models import load, stories_tokenizer

    vocabulary_size = stories_tokenizer.VOCAB_SIZE if prepared.tokenizer_name == "stories" else 0
    vocabulary_size = int(_facts(prepared.output_dir).get("vocabulary_size", vocabulary_size))
    name = settings.model_name_or_path or settings.config_name
    try:
        config = _config(name, settings.config_overrides, vocabulary_size)
        return None if config is None else load.num_parameters(config)
    except (UserError, OSError, ValueError):
        return None  # the training stage will report this error


def _config(name: str, overrides: str, vocabulary_size: int) -> Any:
    from trainer.models import load

    if name in presets.student_names():
        return load.load_config(name, overrides, vocabulary_size) if vocabulary_size else None
    if Path(name).exists():
        return load.load_config(name, overrides)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return load.load_config(str(Path(cached).parent), overrides)
    short = name.rpartition("/")[2].lower()
    return presets.published_config(short) if short in presets.published_names() and not overrides else None


def _facts(shards: str) -> dict[str, Any]:
    path = Path(shards)
    return dict(atomic_dir.read_manifest(path, "shards")["facts"]) if atomic_dir.is_complete(path) else {}


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _training(run: RunSpec) -> tuple[str, str, str]:
    """Return three cells of the status table: progress of the training, final loss, and "done" if the run is exported."""
    assert run.train
    loss, progress = status.final_loss(run.directory), "-"
    exported = status.is_exported(run.directory)
    if exported or status.is_trained(run.directory):
        progress = "done"
    elif run.directory.metrics.is_file():
        steps = status.training_progress(run.train)
        progress = f"{steps.done}/{steps.total or '?'}"
    return progress, "-" if loss is None else f"{loss:.3f}", "done" if exported else "-"


def _evaluation(settings: EvaluateSettings) -> str:
    if status.is_evaluated(settings):
        return status.accuracy(settings)
    if not EvaluationDirectory(Path(settings.output_dir)).rank_files.is_dir():
        return "-"
    progress = status.EvaluationProgress(settings)()
    return f"{progress.done}/{progress.total}"


def make_table(*columns: str) -> Table:
    headers = [Column(name, overflow="fold") for name in columns]
    return Table(*headers, box=None, pad_edge=False, padding=(0, 2, 0, 0))
