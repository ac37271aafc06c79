"""Everything about an evaluation that is known before a weight is read: who, on what, how, and where it goes.

Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.evaluation import model_reference as students
from trainer.evaluation import paths
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
    """One evaluation, checked: the students can read the shards and can be made to write in this mode."""

    models: Mapping[str, ModelReference]  # by part; one may play several
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
        """Who gives the answer."""
        return SOLVER if self.is_pair else STUDENT

    @property
    def shown(self) -> str:
        """What a model is shown of the data beside the problem, in words."""
        names = {Role.SUBQUESTION: "sub-questions", Role.OPERATORS: "operators", Role.EQUATIONS: "equations"}
        return names.get(self.decoding.gold_role, "") if self.decoding.gold_role is not None else ""

    @property
    def first_roles(self) -> dict[str, str]:
        """Every student once, by name: the first part it plays."""
        first: dict[str, str] = {}
        for part, student in self.models.items():
            first.setdefault(student.name, part)
        return first

    def scratch(self, student: ModelReference) -> Path:
        """For the temporary export of a checkpoint; a killed evaluation finds it again."""
        return self.directory.rank_files / self.first_roles[student.name]

    def fingerprint_fields(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """What decides the predictions, with the digests of the students by part. Neither slots nor ranks do."""
        decoding = {name: value for name, value in asdict(self.decoding).items() if name != "batch_size"}
        if not self.is_pair:
            decoding = {name: value for name, value in decoding.items() if name not in _PAIR_ONLY}
        problems = {"max_problems": self.max_problems, "shards_fingerprint": self.shards.fingerprint}
        exports: dict[str, Any] = {"export_digests": dict(digests)}
        if self.decoding.mode == FEW_SHOT:
            problems["exemplars"] = digest({"problems": [asdict(problem) for problem in self.exemplars]})
        return {
            **decoding,
            "dtype": self.dtype,
            **problems,
            **(exports if self.is_pair else {"export_digest": digests.get(STUDENT, "")}),
        }


def resolve_job(settings: EvaluateSettings) -> EvaluationJob:
    """Raises UserError for students and shards that do not fit, and if nobody says where the results go."""
    shards = Shards.open(settings.shards)
    names = {
        STUDENT: settings.model_name_or_path,
        PLANNER: settings.planner,
        DECOMPOSER: settings.decomposer,
        SOLVER: settings.solver,
    }
    found = _one_of_each({part: students.find_model(name) for part, name in names.items() if name})
    students.check_same_tokenizer(found)
    for student in found.values():
        students.check_model(student, shards, settings.allow_unfinished)
    fields = ("calculator", "temperature", "top_p", "seed", "max_new_tokens", "max_steps", "batch_size")
    given = {name: getattr(settings, name) for name in fields}
    if STUDENT in found:
        mode, impose_answer = resolve_mode(settings.mode, found[STUDENT].method)
        decoding = Decoding(mode, impose_answer, **given)
    else:
        if settings.mode != "auto":
            raise UserError(
                f"mode {settings.mode} is for one student; the mode of a pair follows from its exports"
            )
        mode, guidance = resolve_pair(found, settings.guidance_from)
        guidance_from = settings.guidance_from if guidance else ""
        decoding = Decoding(mode, guidance=guidance, guidance_from=guidance_from, **given)
    directory = paths.directory(settings, found, shards, decoding)
    exemplars = read_exemplars(settings.exemplars) if decoding.mode == FEW_SHOT else []
    task = EvaluationJob(
        *(found, shards, decoding, settings.dtype, settings.max_problems, directory),
        exemplars=exemplars,
        model_label=settings.model_label,
    )
    if decoding.gold_role is not None and num_problems_without_gold(task) == task.num_problems:
        raise UserError(f"{shards.path} holds no {task.shown}; prepare shards of data that has them")
    return task


def _one_of_each(found: Mapping[str, ModelReference]) -> dict[str, ModelReference]:
    """A student that plays two parts under two names of one folder is one student."""
    by_folder: dict[Path | str, ModelReference] = {}
    for student in found.values():
        by_folder.setdefault(_folder(student), student)
    return {part: by_folder[_folder(student)] for part, student in found.items()}


def _folder(student: ModelReference) -> Path | str:
    return student.name if student.kind == "model" else Path(student.name).resolve()


def num_problems_without_gold(task: EvaluationJob) -> int:
    """Problems for which the data lacks what a model is to be shown of it: sub-questions, or a plan."""
    shown = task.decoding.gold_role
    if shown is None:
        return 0
    return sum(not len(task.shards.segment_tokens(index, shown)) for index in range(task.num_problems))


def digest(recipe: dict[str, Any]) -> str:
    """Identity of an evaluation: equal recipes give equal predictions."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
