"""Where the results of an evaluation go, and what a run of several students leaves besides. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError
from trainer.evaluation.decoding import DECOMPOSER, SOLVER, STUDENT, Decoding
from trainer.evaluation.model_reference import ModelReference
from trainer.settings import EvaluateSettings
from trainer.shards.read import Shards
from trainer.storage import atomic_dir
from trainer.storage.configuration import to_dict
from trainer.storage.run_directory import EvaluationDirectory, RunDirectory, evaluation_name, pair_run


def directory(
    settings: EvaluateSettings, students: Mapping[str, ModelReference], shards: Shards, decoding: Decoding
) -> EvaluationDirectory:
    """As asked, else in the run of the student, or of the pair: beside the runs of its students, if they are of one
    study, with one data set and one seed. Raises UserError if that says nothing."""
    if settings.output_dir:
        return EvaluationDirectory(Path(settings.output_dir))
    name = _name(students, shards, decoding)
    if STUDENT in students:
        run = students[STUDENT].run
        if run is None:
            raise UserError(
                f"{students[STUDENT].name} is not in a run directory; say where the results go with output_dir"
            )
        return run.evaluation(name)
    runs = [students[part].run for part in (DECOMPOSER, SOLVER) if part in students]
    composite = (
        pair_run(_method(students, decoding), [run for run in runs if run is not None]) if all(runs) else None
    )
    if composite is None:
        told = " and ".join(student.name for student in students.values())
        raise UserError(
            f"{told} are not of runs of one study with the same data and seed; say where the results go with output_dir"
        )
    return composite.evaluation(name)


def write_settings(settings: EvaluateSettings, directory: EvaluationDirectory) -> None:
    """Settings of a run that trains nothing: the newest evaluation's. The settings of a training are left alone."""
    run = RunDirectory(directory.path.parent.parent)
    if run.evaluation(directory.path.name) != directory or (
        run.settings.is_file() and not _is_ours(run.settings)
    ):
        return
    atomic_dir.write_text(run.settings, yaml.safe_dump(to_dict(settings), sort_keys=False))


def _is_ours(path: Path) -> bool:
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(values, dict) and "shards" in values


def _method(students: Mapping[str, ModelReference], decoding: Decoding) -> str:
    """What a study calls the way of answering: the mode and what guides the decomposer; and who is a unified student
    instead of one half of a pair."""
    parts = [part for part in (DECOMPOSER, SOLVER) if part in students]
    unified = [part for part in parts if students[part].method == "socratic"]
    who = ["socratic"] * bool(unified) + (unified if unified != parts else [])
    return "_".join(filter(None, (decoding.mode, decoding.guidance, *who)))


def _name(students: Mapping[str, ModelReference], shards: Shards, decoding: Decoding) -> str:
    parts = [shards.facts["data"], shards.facts["split"], _method(students, decoding)]
    if decoding.guidance_from == "gold":
        parts += ["gold_guidance"]
    name = evaluation_name(
        *parts, calculator=decoding.calculator, temperature=decoding.temperature, seed=decoding.seed
    )
    checkpoints = dict.fromkeys(student.name for student in students.values() if student.kind == "checkpoint")
    return "-".join([name, *(Path(checkpoint).name for checkpoint in checkpoints)])
