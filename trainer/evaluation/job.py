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

from trainer.errors import UserError
from trainer.evaluation import model_reference, paths
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
from trainer.problems.exemplars import read_exemplars
from trainer.problems.problem import Problem
from trainer.settings import EvaluateSettings
from trainer.shards.methods import Role
from trainer.shards.read import Shards
from trainer.storage.run_directory import EvaluationDirectory

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
        names = {Role.SUBQUESTION: "sub-questions", Role.OPERATORS: "operators", Role.EQUATIONS: "equations"}
        segment_role = self.decoding.gold_segment_role
        return "" if segment_role is None else names.get(segment_role, "")

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
        decoding = {name: value for name, value in asdict(self.decoding).items() if name != "batch_size"}
        if not self.is_pair:
            decoding = {name: value for name, value in decoding.items() if name not in _PAIR_ONLY}
        problems = {"max_problems": self.max_problems, "shards_fingerprint": self.shards.fingerprint}
        exports: dict[str, Any] = {"export_digests": dict(digests)}
        if self.decoding.mode == FEW_SHOT:
            problems["exemplars"] = fingerprint({"problems": [asdict(problem) for problem in self.exemplars]})
        return {
            **decoding,
            "dtype": self.dtype,
            **problems,
            **(exports if self.is_pair else {"export_digest": digests.get(STUDENT, "")}),
        }


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
    model_reference.check_same_tokenizer(models)
    for model in models.values():
        model_reference.check_model(model, shards, settings.allow_unfinished)
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
    directory = paths.evaluation_directory(settings, models, shards, decoding)
    exemplars = read_exemplars(settings.exemplars) if decoding.mode == FEW_SHOT else []
    job = EvaluationJob(
        *(models, shards, decoding, settings.dtype, settings.max_problems, directory),
        exemplars=exemplars,
        model_label=settings.model_label,
    )
    if decoding.gold_segment_role is not None and num_problems_without_gold(job) == job.num_problems:
        raise UserError(f"{shards.path} holds no {job.gold_text}; prepare shards of data that has them")
    return job


def _deduplicate(models: Mapping[str, ModelReference]) -> dict[str, ModelReference]:
    """Return the models with one reference per folder, also if two roles spell its path differently."""
    by_folder: dict[Path | str, ModelReference] = {}
    for model in models.values():
        by_folder.setdefault(_folder(model), model)
    return {role: by_folder[_folder(model)] for role, model in models.items()}


def _folder(model: ModelReference) -> Path | str:
    return model.name if model.kind == "model" else Path(model.name).resolve()


def num_problems_without_gold(job: EvaluationJob) -> int:
    """Return the number of problems without the gold segments that a model must read: sub-questions, or a plan."""
    segment_role = job.decoding.gold_segment_role
    if segment_role is None:
        return 0
    return sum(not len(job.shards.segment_tokens(index, segment_role)) for index in range(job.num_problems))


def fingerprint(fields: dict[str, Any]) -> str:
    """Return the hash of `fingerprint_fields`: jobs with equal fingerprints give equal predictions."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
