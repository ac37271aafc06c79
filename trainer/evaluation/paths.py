"""Directory of an evaluation's results, and settings.yaml of a run without training. Imports nothing heavy."""

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


def evaluation_directory(
    settings: EvaluateSettings, models: Mapping[str, ModelReference], shards: Shards, decoding: Decoding
) -> EvaluationDirectory:
    """Return `output_dir`, else an evaluation directory in the run of the model, or in a run of the pair.

    The run of a pair lies beside those of its models, which must have the same study, data set and seed. Raises UserError
    if there is no such run.
    """
    if settings.output_dir:
        return EvaluationDirectory(Path(settings.output_dir))
    name = _name(models, shards, decoding)
    if STUDENT in models:
        run = models[STUDENT].run
        if run is None:
            raise UserError(
                f"{models[STUDENT].name} is not in a run directory; give output_dir for the results"
            )
        return run.evaluation(name)
    runs = [models[role].run for role in (DECOMPOSER, SOLVER) if role in models]
    pair = (
        pair_run(_method(models, decoding), [run for run in runs if run is not None]) if all(runs) else None
    )
    if pair is None:
        names = " and ".join(model.name for model in models.values())
        raise UserError(
            f"{names} are not in runs of one study with the same data and seed; give output_dir for the results"
        )
    return pair.evaluation(name)


def write_settings(settings: EvaluateSettings, directory: EvaluationDirectory) -> None:
    """Write the evaluation's settings as settings.yaml of its run, unless that file is of a training."""
    run = RunDirectory(directory.path.parent.parent)
    if run.evaluation(directory.path.name) != directory or (
        run.settings.is_file() and not _is_of_evaluation(run.settings)
    ):
        return
    atomic_dir.write_text(run.settings, yaml.safe_dump(to_dict(settings), sort_keys=False))


def _is_of_evaluation(path: Path) -> bool:
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(values, dict) and "shards" in values


def _method(models: Mapping[str, ModelReference], decoding: Decoding) -> str:
    """Return mode and guidance, then "socratic" with the roles of unified models, without roles if all are unified."""
    roles = [role for role in (DECOMPOSER, SOLVER) if role in models]
    unified = [role for role in roles if models[role].method == "socratic"]
    suffix = ["socratic"] * bool(unified) + (unified if unified != roles else [])
    return "_".join(filter(None, (decoding.mode, decoding.guidance, *suffix)))


def _name(models: Mapping[str, ModelReference], shards: Shards, decoding: Decoding) -> str:
    fields = [shards.facts["data"], shards.facts["split"], _method(models, decoding)]
    if decoding.guidance_from == "gold":
        fields += ["gold_guidance"]
    name = evaluation_name(
        *fields, calculator=decoding.calculator, temperature=decoding.temperature, seed=decoding.seed
    )
    checkpoints = dict.fromkeys(model.name for model in models.values() if model.kind == "checkpoint")
    return "-".join([name, *(Path(checkpoint).name for checkpoint in checkpoints)])
