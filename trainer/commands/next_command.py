"""The command that usually follows a finished command. It is the last line that the finished command prints.

A word in capitals, e.g. TEST_SHARDS, stands for a value that the finished command cannot know.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from trainer.runtime import terminal
from trainer.settings import PrepareSettings
from trainer.storage import atomic_dir
from trainer.storage.manifest import ShardFacts
from trainer.storage.run_directory import (
    AnnotationDirectory,
    EvaluationDirectory,
    RunDirectory,
    parse_run_name,
)

_HELD_OUT_SPLITS = ("test", "dev", "validation")  # beginnings of split names
_TRAINING_METHODS = ("socratic", "cot", "answer_only")  # the first method that the shards support is proposed


def print_next(command: Sequence[str]) -> None:
    """Print a command, a key of COMMANDS and its arguments, on rank 0. Print nothing in a study, which runs it itself."""
    from trainer.study.processes import STUDY_VARIABLE

    if command and STUDY_VARIABLE not in os.environ:
        name, *arguments = command
        terminal.info(f"next: {shlex.join([*_program(name), *arguments])}")


def after_prepare(settings: PrepareSettings, facts: ShardFacts) -> list[str]:
    """Return a training on the shards, or an evaluation if their split is held out."""
    shards = settings.output_dir
    if facts["split"].startswith(_HELD_OUT_SPLITS):
        return ["evaluate", "--model_name_or_path", "EXPORT", "--shards", shards]
    model = ["--model_name_or_path", settings.tokenizer_name]
    if settings.tokenizer_name == "stories":  # this tokenizer belongs to no pretrained model
        model = ["--config_name", "stories-0.2m"]
    elif (folder := Path(settings.tokenizer_name)).is_dir() and not (folder / "config.json").is_file():
        model = ["--model_name_or_path", "MODEL"]
    counts = facts["problems_per_method"]
    method = next((name for name in _TRAINING_METHODS if counts.get(name)), _TRAINING_METHODS[-1])
    run = f"runs/mine/{facts['data']}.{method}.{Path(model[1]).name}.s0"
    return ["train", "--train_shards", shards, "--method", method, *model, "--output_dir", run]


def after_convert(export: Path) -> list[str]:
    """Return an evaluation of the export, together with the other model of a pair if it cannot answer alone."""
    from trainer.shards.methods import guidance_of, is_decomposer, is_planner

    run = RunDirectory(export.parent)
    method = atomic_dir.read_manifest(export)["facts"]["method"]
    models = ["--model_name_or_path", str(export)]
    if method == "solver":
        models = ["--subquestions", "gold", "--solver", str(export)]
    elif is_planner(method):
        models = ["--planner", str(export), "--decomposer", "DECOMPOSER_EXPORT", "--solver", _solver_of(run)]
    elif is_decomposer(method):
        models = ["--decomposer", str(export), "--solver", _solver_of(run)]
        models += ["--guidance_from", "gold"] if guidance_of(method) else []
    output = [] if run.export == export else ["--output_dir", "RESULTS"]
    return ["evaluate", *models, "--shards", _test_shards(run), *output]


def after_evaluate(directory: EvaluationDirectory) -> list[str]:
    """Return the report of the study that contains the evaluation, or [] if the evaluation is in no run directory."""
    run = RunDirectory(directory.path.parent.parent)
    is_in_run = run.evaluation(directory.name) == directory and run.settings.is_file()
    return ["plot_scaling", str(run.path.parent)] if is_in_run else []


def after_annotate(output_dir: str, split: str) -> list[str]:
    """Return the preparation of shards from the annotated problems."""
    directory = AnnotationDirectory(Path(output_dir))
    problems = str(directory.result / "annotated.jsonl")
    names = ["--tokenizer_name", "MODEL", "--output_dir", f"shards/{directory.name}"]
    return ["prepare_shards", "--data", "jsonl", "--data_path", problems, "--split", split, *names]


def _program(name: str) -> list[str]:
    """Return the words that start a command in the form in which this process was started."""
    script = Path(sys.argv[0])
    if script.suffix == ".py" and script.parent.name == "tools":
        return ["python", str(script.with_name(f"{name}.py"))]
    return ["socratic", name]


def _solver_of(run: RunDirectory) -> str:
    """Return the path of the export of the solver with the same data, model and seed, whether it exists or not."""
    data, _, model, seed = parse_run_name(run.name)
    if not data:
        return "SOLVER_EXPORT"
    return str(RunDirectory(run.path.with_name(f"{data}.solver.{model}.s{seed}")).export)


def _test_shards(run: RunDirectory) -> str:
    """Return the test shards beside the run's training shards: the same path with "test" in place of "train"."""
    try:
        settings = yaml.safe_load(run.settings.read_text(encoding="utf-8"))
        path = Path(settings["train_shards"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return "TEST_SHARDS"
    test = path.with_name(path.name.replace("train", "test"))
    return str(test) if test != path and atomic_dir.is_complete(test) else "TEST_SHARDS"
