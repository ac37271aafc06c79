"""A study as tables: what would be run, and how far it is. Reads the disk, starts nothing."""

from __future__ import annotations

import io
import shlex
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainer import commit, terminal
from trainer.run_directory import EvaluationDirectory
from trainer.settings import EvaluateSettings
from trainer.study import changes, processes, stages, state
from trainer.study.plan import Run, Study

_WIDTH_OF_A_PIPE = 160  # where there is no terminal whose width one could ask for


def show_status(study: Study) -> None:
    """Print how far every run is, with its loss and its accuracies (strict, 95 % interval)."""
    table = _table("run", "train", "loss", "convert", *_evaluation_sets(study))
    for run in study.runs:
        losses = state.final_loss(run.directory)
        cells = {Path(e.shards).name: _evaluation(e) for e in run.evaluations}
        table.add_row(
            run.name,
            _training(run),
            "-" if losses is None else f"{losses:.3f}",
            _converted(run),
            *(cells.get(name, "") for name in _evaluation_sets(study)),
        )
    todo = stages.of_study(study)
    done = sum(state.is_done(stage) for stage in todo)
    terminal.say(f"study {study.name} ({study.directory.path}): {done} of {len(todo)} stages done")
    for settings in study.shards:
        ready = "not prepared"
        if state.shards_ready(settings):
            facts = commit.read_manifest(Path(settings.output_dir))["facts"]
            ready = f"{facts['num_problems']} problems"
        terminal.say(f"shards {settings.output_dir}: {ready}")
    terminal.say(_text(table))
    running = processes.who_runs(study.directory)
    leftovers = processes.of_study(study.directory)
    if running:
        terminal.say(f"being run by {running}")
    elif leftovers:
        numbers = ", ".join(str(process.pid) for process in leftovers)
        terminal.say(
            f"not being run, but processes {numbers} of an earlier start live; a run ends them first"
        )
    if state.is_done(todo[-1]):
        terminal.say(f"report: {study.directory.report / 'index.html'}")


def show_plan(study: Study, tools: Path) -> None:
    """Print every stage, whether it is done, and the commands of the others. Raises UserError as a run would."""
    changes.refuse(study)
    todo = stages.of_study(study)
    waiting = [stage for stage in todo if not state.is_done(stage)]
    table = _table("", "stage", "state", "ranks")
    for number, stage in enumerate(todo, 1):
        table.add_row(str(number), stage.label, "to do" if stage in waiting else "done", str(stage.num_ranks))
    terminal.say(_text(table))
    terminal.say(f"study {study.name}: {len(study.runs)} runs, {len(todo)} stages, {len(waiting)} to do")
    for stage in waiting:
        terminal.say("\n" + shlex.join(stages.command(stage, tools, study.launcher)))


def _training(run: Run) -> str:
    if state.trained(run.directory) or state.exported(run.directory):
        return "done"
    progress = state.training_progress(run.train)
    if not run.directory.metrics.is_file():
        return "-"
    return f"{progress.done}/{progress.total or '?'}"


def _converted(run: Run) -> str:
    return "done" if state.exported(run.directory) else "-"


def _evaluation(settings: EvaluateSettings) -> str:
    if state.evaluated(settings):
        return state.accuracy(settings)
    if not EvaluationDirectory(Path(settings.output_dir)).parts.is_dir():
        return "-"
    progress = state.EvaluationProgress(settings)()
    return f"{progress.done}/{progress.total}"


def _evaluation_sets(study: Study) -> list[str]:
    """Names of the evaluated shard sets, in the order of the file."""
    return list(dict.fromkeys(Path(e.shards).name for run in study.runs for e in run.evaluations))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _text(table: Table) -> str:
    """The table as plain text, as wide as the terminal."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDTH_OF_A_PIPE
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
