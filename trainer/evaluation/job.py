"""Models, shards, decoding settings and output directory of an evaluation, checked before any weights are loaded.

Imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError
from trainer.evaluation import model_reference
from trainer.evaluation.decoding import (
    DECOMPOSER,
    FEW_SHOT,
    PLANNER,
    SINGLE_MODEL_MODES,
    SOLVER,
    STUDENT,
    Decoding,
    resolve_mode,
    resolve_pair,
)
from trainer.evaluation.model_reference import ModelReference
from trainer.problems.problem import Problem
from trainer.problems.sources import read_exemplars
from trainer.runtime import distributed
from trainer.settings import EvaluateSettings
from trainer.shards.methods import SegmentRole
from trainer.shards.read import Shards
from trainer.storage import atomic_dir
from trainer.storage.configuration import to_dict
from trainer.storage.run_directory import EvaluationDirectory, RunDirectory, evaluation_name, pair_run

_PAIR_ONLY = ("max_steps", "guidance", "guidance_from")


@dataclass(frozen=True)
class EvaluationJob:
    """One checked evaluation: the models have the tokenizer of the shards and can answer in this mode."""

    models: Mapping[str, ModelReference]  # by role; a model may have several
    shards: Shards
    decoding: Decoding
    dtype: str
    max_problems: int  # 0: all
    directory: EvaluationDirectory
    exemplars: Sequence[Problem] = ()
    model_label: str = ""

    @property
    def num_problems(self) -> int:
        return min(self.max_problems or len(self.shards), len(self.shards))

    @property
    def is_pair(self) -> bool:
        return self.decoding.mode not in SINGLE_MODEL_MODES

    @property
    def answering_role(self) -> str:
        """The role that generates the answer."""
        return SOLVER if self.is_pair else STUDENT

    @property
    def gold_text(self) -> str:
        """Name in messages of the gold segments that a model reads; "" without any."""
        names = {
            SegmentRole.SUBQUESTION: "sub-questions",
            SegmentRole.OPERATORS: "operators",
            SegmentRole.EQUATIONS: "equations",
        }
        segment_role = self.decoding.gold_segment_role
        return "" if segment_role is None else names.get(segment_role, "")

    @property
    def num_problems_without_gold(self) -> int:
        """Number of problems without the gold segments that a model must read: sub-questions, or a plan."""
        segment_role = self.decoding.gold_segment_role
        if segment_role is None:
            return 0
        return sum(not len(self.shards.segment_tokens(i, segment_role)) for i in range(self.num_problems))

    @property
    def first_roles(self) -> dict[str, str]:
        """Model name -> the first of its roles, once per distinct model."""
        first: dict[str, str] = {}
        for role, model in self.models.items():
            first.setdefault(model.name, role)
        return first

    def scratch(self, model: ModelReference) -> Path:
        """Return the directory for the temporary export of a checkpoint, which a restarted evaluation reuses."""
        return self.directory.rank_files / self.first_roles[model.name]

    def fingerprint_fields(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """Return the settings that predictions depend on. `digests`: content digests of the models by role."""
        fields = {name: value for name, value in asdict(self.decoding).items() if name != "batch_size"}
        if not self.is_pair:
            fields = {name: value for name, value in fields.items() if name not in _PAIR_ONLY}
        fields["dtype"] = self.dtype
        fields["max_problems"] = self.max_problems
        fields["shards_fingerprint"] = self.shards.fingerprint
        if self.decoding.mode == FEW_SHOT:
            fields["exemplars"] = fingerprint({"problems": [asdict(problem) for problem in self.exemplars]})
        if self.is_pair:
            return {**fields, "export_digests": dict(digests)}
        return {**fields, "export_digest": digests.get(STUDENT, "")}

    def result_fields(self, sizes: Mapping[str, int], digests: Mapping[str, str]) -> dict[str, Any]:
        """Return the fields of results.json about models and data; "" or None where the model's manifest lacks a fact.

        sizes, digests: parameters and content digests by role. `total_parameters` counts each distinct model once.
        """
        main = self.models[self.answering_role]
        models = (_model_name(model) for role, model in self.models.items() if role != PLANNER)
        mode = self.decoding.mode
        facts = {
            "data": self.shards.facts["data"],
            "split": self.shards.facts["split"],
            "model_name": self.model_label or " + ".join(dict.fromkeys(models)),
            "method": mode if self.is_pair or mode == FEW_SHOT else main.facts.get("method", ""),
            "train_seed": main.facts.get("seed"),
            "train_data": main.facts.get("data", ""),
            "step": main.facts.get("step"),
            "finished": main.facts.get("finished"),
            "num_parameters": sizes[self.answering_role],
            "total_parameters": sum(sizes[role] for role in self.first_roles.values()),
            "warnings": self.warnings(),
        }
        if not self.is_pair:
            return facts
        return facts | {
            role: {
                "name": model.name,
                "model_name": _model_name(model),
                "method": model.method,
                "num_parameters": sizes[role],
                "export_digest": digests[role],
            }
            for role, model in self.models.items()
        }

    def warnings(self) -> list[str]:
        """Return the warnings to log and to record in results.json."""
        found = []
        main = self.models[self.answering_role]
        learned = main.facts.get("train_on_calculator_results") is not False
        if self.decoding.mode != "answer_only" and not self.decoding.calculator and not learned:
            found.append(
                f"the {self.answering_role} has no calculator and did not learn the calculator's results "
                "(train_on_calculator_results)"
            )
        for role in self.first_roles.values():
            facts = self.models[role].facts
            if facts.get("finished") is False:
                found.append(f"the {role}'s training stopped at step {facts.get('step')}, before its end")
            for fact in ("data", "seed"):
                if facts.get(fact) != main.facts.get(fact):
                    found.append(
                        f"the {role} was trained with {fact} {facts.get(fact)}, "
                        f"the {self.answering_role} with {fact} {main.facts.get(fact)}"
                    )
        if lacking := self.num_problems_without_gold:
            found.append(f"{lacking} of {self.num_problems} problems have no gold {self.gold_text} to show")
        return found

    def describe(self) -> str:
        """Return the job as one log line."""
        decoding = self.decoding
        sampling = f"temperature {decoding.temperature:g}" if decoding.temperature else "greedy"
        calculator = "with calculator" if decoding.calculator else "without calculator"
        slots = f"{distributed.environment().world_size} x {decoding.batch_size} slots"
        return (
            f"{' and '.join(self.first_roles)} on {self.shards.path}: {decoding.mode}, {sampling}, {calculator}, "
            f"{self.num_problems} problems, {slots}"
        )


def resolve_job(settings: EvaluateSettings) -> EvaluationJob:
    """Return the checked job. Raises UserError if models, shards and settings are incompatible, or without a directory."""
    shards = Shards.open(settings.shards)
    names = {
        STUDENT: settings.model_name_or_path,
        PLANNER: settings.planner,
        DECOMPOSER: settings.decomposer,
        SOLVER: settings.solver,
    }
    models = _deduplicate({role: model_reference.find_model(name) for role, name in names.items() if name})
    model_reference.check_models(models, shards, settings.allow_unfinished)
    fields = ("calculator", "temperature", "top_p", "seed", "max_new_tokens", "max_steps", "batch_size")
    given = {name: getattr(settings, name) for name in fields}
    if STUDENT in models:
        mode, impose_answer = resolve_mode(settings.mode, models[STUDENT].method)
        decoding = Decoding(mode, impose_answer, **given)
    else:
        if settings.mode != "auto":
            raise UserError(
                f"mode {settings.mode} is for one model; the mode of a pair follows from its exports"
            )
        mode, guidance = resolve_pair(models, settings.guidance_from)
        guidance_from = settings.guidance_from if guidance else ""
        decoding = Decoding(mode, guidance=guidance, guidance_from=guidance_from, **given)
    directory = evaluation_directory(settings, models, shards, decoding)
    exemplars = read_exemplars(settings.exemplars) if decoding.mode == FEW_SHOT else []
    job = EvaluationJob(
        *(models, shards, decoding, settings.dtype, settings.max_problems, directory),
        exemplars=exemplars,
        model_label=settings.model_label,
    )
    if decoding.gold_segment_role is not None and job.num_problems_without_gold == job.num_problems:
        raise UserError(f"{shards.path} holds no {job.gold_text}; prepare shards of data that has them")
    return job


def _deduplicate(models: Mapping[str, ModelReference]) -> dict[str, ModelReference]:
    """Return the models with one reference per folder, also if two roles spell its path differently."""
    by_folder: dict[Path | str, ModelReference] = {}
    found = {}
    for role, model in models.items():
        folder = model.name if model.kind == "model" else Path(model.name).resolve()
        found[role] = by_folder.setdefault(folder, model)
    return found


def _model_name(model: ModelReference) -> str:
    return str(model.facts.get("model_name", Path(model.name).name))


def evaluation_directory(
    settings: EvaluateSettings, models: Mapping[str, ModelReference], shards: Shards, decoding: Decoding
) -> EvaluationDirectory:
    """Return `output_dir`, else an evaluation directory in the run of the model, or in a run of the pair.

    The run of a pair lies beside those of its models, which must have the same study, data set and seed. Raises UserError
    if there is no such run.
    """
    if settings.output_dir:
        return EvaluationDirectory(Path(settings.output_dir))
    fields = [shards.facts["data"], shards.facts["split"], _method(models, decoding)]
    if decoding.guidance_from == "gold":
        fields += ["gold_guidance"]
    name = evaluation_name(
        *fields, calculator=decoding.calculator, temperature=decoding.temperature, seed=decoding.seed
    )
    checkpoints = dict.fromkeys(model.name for model in models.values() if model.kind == "checkpoint")
    name = "-".join([name, *(Path(checkpoint).name for checkpoint in checkpoints)])
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
    """Write settings.yaml of the run that holds the evaluation.

    Does nothing if a training wrote that file, or if `directory` is not in a run directory.
    """
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


def fingerprint(fields: dict[str, Any]) -> str:
    """Return the hash of `fingerprint_fields`: jobs with equal fingerprints give equal predictions."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
