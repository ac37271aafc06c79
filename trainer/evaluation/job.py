"""Models, shards, decoding settings and output directory of an evaluation, checked before any weights are loaded.

Importing this module imports neither torch nor transformers.
"""

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
from trainer.shards.read import Shards
from trainer.storage import atomic_dir
from trainer.storage.run_directory import EvaluationDirectory, RunDirectory, evaluation_name, pair_run


@dataclass(frozen=True)
class EvaluationJob:
    """A checked evaluation. All models support the decoding mode and, as far as recorded, use the shards' tokenizer."""

    models: Mapping[str, ModelReference]  # role -> model; two roles may have the same model
    shards: Shards
    decoding: Decoding
    dtype: str
    max_problems: int  # 0: all problems
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
        """Name, in messages, of the gold segments (plan or sub-questions from the data). Valid only if a model reads them."""
        return self.decoding.guidance or "sub-questions"

    @property
    def num_problems_without_gold(self) -> int:
        """Number of problems that lack the gold segments that a model reads; 0 if no model reads gold segments."""
        segment_role = self.decoding.gold_segment_role
        if segment_role is None:
            return 0
        return sum(not len(self.shards.segment_tokens(i, segment_role)) for i in range(self.num_problems))

    @property
    def first_roles(self) -> dict[str, str]:
        """Map from the name of each model to the first role that uses the model."""
        first: dict[str, str] = {}
        for role, model in self.models.items():
            first.setdefault(model.name, role)
        return first

    def export_scratch_dir(self, model: ModelReference) -> Path:
        """Return the directory for the temporary export of a checkpoint. A restarted evaluation reuses this export."""
        return self.directory.rank_files / self.first_roles[model.name]

    def fingerprint_fields(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """Return the settings and digests that predictions depend on. `digests`: content digests of the models by role."""
        pair_fields = ("max_steps", "guidance", "guidance_from")
        omitted = ("batch_size", *(() if self.is_pair else pair_fields))
        fields = {name: value for name, value in asdict(self.decoding).items() if name not in omitted}
        fields |= {"dtype": self.dtype, "max_problems": self.max_problems}
        fields["shards_fingerprint"] = self.shards.fingerprint
        if self.decoding.mode == FEW_SHOT:
            fields["exemplars"] = job_fingerprint(
                {"problems": [asdict(problem) for problem in self.exemplars]}
            )
        if self.is_pair:
            return {**fields, "export_digests": dict(digests)}
        return {**fields, "export_digest": digests.get(STUDENT, "")}

    def result_fields(self, num_parameters: Mapping[str, int], digests: Mapping[str, str]) -> dict[str, Any]:
        """Return the fields of results.json about models and data. Facts that the model's manifest lacks are "" or None.

        num_parameters: number of parameters of the model of each role. digests: content digest of the model of each role.
        The result's `total_parameters` counts a model with two roles once.
        """
        facts, mode = self.models[self.answering_role].facts, self.decoding.mode
        model_names = (_model_name(model) for role, model in self.models.items() if role != PLANNER)
        result = {
            "data": self.shards.facts["data"],
            "split": self.shards.facts["split"],
            "model_name": self.model_label or " + ".join(dict.fromkeys(model_names)),
            "method": mode if self.is_pair or mode == FEW_SHOT else facts.get("method", ""),
            "train_seed": facts.get("seed"),
            "train_data": facts.get("data", ""),
            "step": facts.get("step"),
            "finished": facts.get("finished"),
            "num_parameters": num_parameters[self.answering_role],
            "total_parameters": sum(num_parameters[role] for role in self.first_roles.values()),
            "warnings": self.warnings(),
        }
        if not self.is_pair:
            return result
        return result | {
            role: {
                "name": model.name,
                "model_name": _model_name(model),
                "method": model.method,
                "num_parameters": num_parameters[role],
                "export_digest": digests[role],
            }
            for role, model in self.models.items()
        }

    def warnings(self) -> list[str]:
        """Return the warnings to log and to record in results.json."""
        warnings, answering_role = [], self.answering_role
        answering_facts = self.models[answering_role].facts
        learned_results = answering_facts.get("train_on_calculator_results") is not False
        if self.decoding.mode != "answer_only" and not self.decoding.calculator and not learned_results:
            warnings.append(
                f"the {answering_role} has no calculator and did not learn the calculator's results "
                "(train_on_calculator_results)"
            )
        for role in self.first_roles.values():
            facts = self.models[role].facts
            if facts.get("finished") is False:
                warnings.append(f"the {role}'s training stopped at step {facts.get('step')}, before its end")
            warnings += [
                f"the {role} was trained with {name} {facts.get(name)}, "
                f"the {answering_role} with {name} {answering_facts.get(name)}"
                for name in ("data", "seed")
                if facts.get(name) != answering_facts.get(name)
            ]
        if num_lacking := self.num_problems_without_gold:
            warnings.append(
                f"{num_lacking} of {self.num_problems} problems have no gold {self.gold_text} to show"
            )
        return warnings

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
    """Return the checked job. Raises UserError for incompatible models, shards or settings, or if output_dir is missing."""
    shards = Shards.open(settings.shards)
    names = {STUDENT: settings.model_name_or_path, PLANNER: settings.planner}
    names |= {DECOMPOSER: settings.decomposer, SOLVER: settings.solver}
    models = _deduplicate({role: model_reference.find_model(name) for role, name in names.items() if name})
    model_reference.check_models(models, shards, settings.allow_unfinished)
    fields = ("calculator", "temperature", "top_p", "seed", "max_new_tokens", "max_steps", "batch_size")
    shared = {name: getattr(settings, name) for name in fields}
    if STUDENT in models:
        mode, impose_answer = resolve_mode(settings.mode, models[STUDENT].method)
        decoding = Decoding(mode, impose_answer, **shared)
    else:
        if settings.mode != "auto":
            raise UserError(
                f"mode {settings.mode} is for one model; the mode of a pair follows from its exports"
            )
        mode, guidance = resolve_pair(models, settings.guidance_from)
        guidance_from = settings.guidance_from if guidance else ""
        decoding = Decoding(mode, guidance=guidance, guidance_from=guidance_from, **shared)
    directory = _evaluation_directory(settings, models, shards, decoding)
    exemplars = read_exemplars(settings.exemplars) if decoding.mode == FEW_SHOT else []
    limits = settings.dtype, settings.max_problems
    job = EvaluationJob(models, shards, decoding, *limits, directory, exemplars, settings.model_label)
    if decoding.gold_segment_role is not None and job.num_problems_without_gold == job.num_problems:
        raise UserError(f"{shards.path} holds no {job.gold_text}; prepare shards of data that has them")
    return job


def _deduplicate(models: Mapping[str, ModelReference]) -> dict[str, ModelReference]:
    """Return `models` with one reference per folder, even if two roles spell the path of a folder in different ways."""
    by_folder: dict[Path | str, ModelReference] = {}
    return {
        role: by_folder.setdefault(model.name if model.kind == "model" else Path(model.name).resolve(), model)
        for role, model in models.items()
    }


def _model_name(model: ModelReference) -> str:
    return str(model.facts.get("model_name", Path(model.name).name))


def _evaluation_directory(
    settings: EvaluateSettings, models: Mapping[str, ModelReference], shards: Shards, decoding: Decoding
) -> EvaluationDirectory:
    """Return `output_dir` if it is set, else an evaluation directory in the run directory of the model or pair.

    The run directory of a pair lies beside the run directories of its decomposer and solver. Without `output_dir`, raises
    UserError if one of these models (or the single model) is in no run directory, or if the two runs differ in study, data
    set or seed.
    """
    if settings.output_dir:
        return EvaluationDirectory(Path(settings.output_dir))
    method = _method(models, decoding)
    fields = [shards.facts["data"], shards.facts["split"], method]
    fields += ["gold_guidance"] * (decoding.guidance_from == "gold")
    name = evaluation_name(
        *fields, calculator=decoding.calculator, temperature=decoding.temperature, seed=decoding.seed
    )
    checkpoints = dict.fromkeys(model.name for model in models.values() if model.kind == "checkpoint")
    name = "-".join([name, *(Path(checkpoint).name for checkpoint in checkpoints)])
    if STUDENT in models:
        run = models[STUDENT].run_directory
        if run is None:
            raise UserError(
                f"{models[STUDENT].name} is not in a run directory; give output_dir for the results"
            )
        return run.evaluation(name)
    role_runs = [models[role].run_directory for role in (DECOMPOSER, SOLVER) if role in models]
    runs = [run for run in role_runs if run is not None]
    run = pair_run(method, runs) if len(runs) == len(role_runs) else None
    if run is None:
        names = " and ".join(model.name for model in models.values())
        raise UserError(
            f"{names} are not in runs of one study with the same data and seed; give output_dir for the results"
        )
    return run.evaluation(name)


def write_settings(settings: EvaluateSettings, directory: EvaluationDirectory) -> None:
    """Write `settings` to settings.yaml of the run directory that contains the evaluation directory `directory`.

    Does nothing if the existing settings.yaml is not from an evaluation, or if `directory` is not in a run directory.
    """
    run = RunDirectory(directory.path.parent.parent)
    if run.evaluation(directory.path.name) != directory:
        return
    if run.settings.is_file():
        try:
            existing: Any = yaml.safe_load(run.settings.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError):
            return
        if not isinstance(existing, dict) or "shards" not in existing:
            return
    atomic_dir.write_text(run.settings, yaml.safe_dump(asdict(settings), sort_keys=False))


def _method(models: Mapping[str, ModelReference], decoding: Decoding) -> str:
    """Return the method for the name of a run or evaluation, e.g. "iterative_ahead_operators_socratic_solver".

    Parts: mode; kind of plan, if the decomposer reads a plan; "socratic", if the decomposer or the solver has this method.
    The last part is the role of this model, if the other model has another method.
    """
    roles = [role for role in (DECOMPOSER, SOLVER) if role in models]
    unified = [role for role in roles if models[role].method == "socratic"]
    suffix = ["socratic"] * bool(unified) + (unified if unified != roles else [])
    return "_".join(filter(None, (decoding.mode, decoding.guidance, *suffix)))


def job_fingerprint(fields: dict[str, Any]) -> str:
    """Return the SHA-256 of `fields` in JSON. Jobs with the same digest of `fingerprint_fields` make the same predictions."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
