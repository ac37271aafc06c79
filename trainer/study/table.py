"""Tables of the plan and the progress of a study, read from disk without a network."""

from __future__ import annotations

import io
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.errors import UserError
from trainer.models import presets
from trainer.runtime import directory_lock, terminal
from trainer.settings import EvaluateSettings, PrepareSettings, TrainSettings
from trainer.storage import atomic_dir
from trainer.storage.run_directory import EvaluationDirectory
from trainer.study import changes, processes, stages, status
from trainer.study.expand import evaluation_variant
from trainer.study.study_file import RunSpec, Study

_WIDTH_WITHOUT_TERMINAL = 160


def show_status(study: Study) -> None:
    """Print the progress of every run, its loss and its accuracies (strict, 95 % interval)."""
    variants = list(dict.fromkeys(evaluation_variant(e) for run in study.runs for e in run.evaluations))
    table = make_table("run", "train", "loss", "convert", *variants)
    for run in study.runs:
        training = _training(run) if run.train else ("", "", "")
        cells = {evaluation_variant(settings): _evaluation(settings) for settings in run.evaluations}
        table.add_row(run.name, *training, *(cells.get(name, "") for name in variants))
    todo = stages.study_stages(study)
    done = sum(status.is_done(stage) for stage in todo)
    terminal.info(f"study {study.name} ({study.directory.path}): {done} of {len(todo)} stages done")
    for settings in study.shards:
        ready = "not prepared"
        if status.are_shards_ready(settings):
            facts = atomic_dir.read_manifest(Path(settings.output_dir))["facts"]
            ready = f"{facts['num_problems']} problems"
        terminal.info(f"shards {settings.output_dir}: {ready}")
    terminal.info(table_text(table))
    if running := directory_lock.current_owner(study.directory.lock):
        terminal.info(f"in use: {running.process}, since {running.since}")
    elif leftovers := processes.processes_of_study(study.directory):
        numbers = ", ".join(str(process.pid) for process in leftovers)
        terminal.info(
            f"not running, but processes {numbers} of an earlier start are alive; a run ends them first"
        )
    if status.is_done(todo[-1]):
        terminal.info(f"report: {study.directory.report / 'index.html'}")


def print_dry_run(study: Study, tools: Path | None) -> None:
    """Print models, stages and the commands of stages that are not done. Raises UserError if a run would."""
    changes.check_unchanged(study)
    todo = stages.study_stages(study)
    waiting = [stage for stage in todo if not status.is_done(stage)]
    terminal.info(table_text(_models(study)) + "\n")
    table = make_table("", "stage", "state", "ranks", "problems")
    for number, stage in enumerate(todo, 1):
        ready = "to do" if stage in waiting else "done"
        table.add_row(str(number), stage.label, ready, str(stage.num_ranks), _stage_problems(stage, study))
    terminal.info(table_text(table))
    terminal.info(f"study {study.name}: {len(study.runs)} runs, {len(todo)} stages, {len(waiting)} to do")
    for stage in waiting:
        terminal.info("\n" + shlex.join(stages.stage_command(stage, tools, study.launcher)))


def _models(study: Study) -> Table:
    """Return a table of the models; `?` marks what is not known without a network."""
    table = make_table("model", "from", "parameters", "ranks", "deepspeed", "dtype")
    prepared = {settings.output_dir: settings for settings in study.shards}
    seen = set()
    for run in study.runs:
        if run.train and run.train.model_label not in seen:
            seen.add(run.train.model_label)
            settings = run.train
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
    """Return the number of problems that a stage prepares, trains on or evaluates; "?" if unknown."""
    if stage.kind == "prepare":
        return _number(num_problems(stage.settings))
    if stage.kind == "train":
        return _number(num_examples(stage.settings, study.shards))
    if stage.kind == "evaluate":
        return _number(num_answers(stage.settings, study.shards))
    return ""


def num_problems(settings: PrepareSettings) -> int | None:
    """Return the problems in a set, from its shards or its settings; None if they depend on a source not read yet."""
    if facts := _facts(settings.output_dir):
        return int(facts["num_problems"])
    if settings.data == "stories":
        return min(settings.max_problems or settings.num_problems, settings.num_problems)
    return None


def num_examples(training: TrainSettings, shards: Iterable[PrepareSettings]) -> int | None:
    """Return the training problems that have the steps the method requires; None if unknown."""
    facts = _facts(training.train_shards)
    if "problems_per_method" in facts:
        return int(facts["problems_per_method"].get(training.method, 0))
    return _num_problems_in(training.train_shards, shards)


def num_answers(evaluation: EvaluateSettings, shards: Iterable[PrepareSettings]) -> int | None:
    """Return the problems that an evaluation answers; None if unknown."""
    available = _num_problems_in(evaluation.shards, shards)
    return available and min(evaluation.max_problems or available, available)


def _num_problems_in(path: str, shards: Iterable[PrepareSettings]) -> int | None:
    return next(num_problems(settings) for settings in shards if settings.output_dir == path)


def num_parameters(settings: TrainSettings, prepared: PrepareSettings) -> int | None:
    """Return the number of parameters from the config of a preset, a local folder or a model in the Hub's local cache.

    None if it would require the network or a vocabulary that does not exist yet.
    """
    from trainer.models import load, stories_tokenizer

    name = settings.model_name_or_path or settings.config_name
    facts, vocabulary_size = _facts(prepared.output_dir), 0
    if facts:
        vocabulary_size = int(facts["vocabulary_size"])
    elif prepared.tokenizer_name == "stories":
        vocabulary_size = stories_tokenizer.VOCAB_SIZE
    try:
        config = _config(name, settings.config_overrides, vocabulary_size)
        return None if config is None else load.num_parameters(config)
    except (UserError, OSError, ValueError):
        return None  # the training stage reports the error


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
    """Return the cells of a training: its progress, its loss, and whether its checkpoint is converted."""
    assert run.train
    loss, training = status.final_loss(run.directory), "-"
    exported = status.is_exported(run.directory)
    if exported or status.is_trained(run.directory):
        training = "done"
    elif run.directory.metrics.is_file():
        progress = status.training_progress(run.train)
        training = f"{progress.done}/{progress.total or '?'}"
    return training, "-" if loss is None else f"{loss:.3f}", "done" if exported else "-"


def _evaluation(settings: EvaluateSettings) -> str:
    if status.is_evaluated(settings):
        return status.accuracy(settings)
    if not EvaluationDirectory(Path(settings.output_dir)).rank_files.is_dir():
        return "-"
    progress = status.EvaluationProgress(settings)()
    return f"{progress.done}/{progress.total}"


def make_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def table_text(table: Table) -> str:
    """Return the table as plain text, as wide as the terminal."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
