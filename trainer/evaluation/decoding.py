"""How students are made to write: the mode of an evaluation, and who may play which part in it. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.errors import UserError
from trainer.shards.methods import Role, guidance_of, is_decomposer, is_interleaved, is_planner

if TYPE_CHECKING:
    from trainer.evaluation.model_reference import ModelReference

UNIFIED = ("answer_only", "cot", "socratic")
FEW_SHOT = "few_shot"  # a model that was never distilled, shown exemplars
SINGLE_MODEL_MODES = (*UNIFIED, FEW_SHOT)  # modes of one model
AHEAD, INTERLEAVED, GOLD = "iterative_ahead", "iterative_interleaved", "gold_subquestions"
STUDENT, PLANNER, DECOMPOSER, SOLVER = "student", "planner", "decomposer", "solver"  # the parts


@dataclass(frozen=True)
class Decoding:
    """The fields of `EvaluateSettings` that a solution depends on; `mode` is a resolved one.

    impose_answer: every solution begins with the delimiter, so that a student of another method answers at once.
    guidance: what guides the decomposer, "operators" or "equations", and guidance_from: who writes it, "planner" or
    "gold"; both "" if nothing does.
    """

    mode: str
    impose_answer: bool = False
    calculator: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256
    max_steps: int = 16
    guidance: str = ""
    guidance_from: str = ""
    batch_size: int = 32  # slots of a rank

    @property
    def guidance_role(self) -> Role | None:
        """The role of the plan that guides the decomposer."""
        return Role[self.guidance.upper()] if self.guidance else None

    @property
    def gold_role(self) -> Role | None:
        """Segments of the data beside the problem that a model is shown."""
        if self.mode == GOLD:
            return Role.SUBQUESTION
        return self.guidance_role if self.guidance_from == "gold" else None


def resolve_mode(mode: str, method: str | None) -> tuple[str, bool]:
    """The mode of a student alone, and whether it has to be imposed on it.

    "auto" is the student's own method. A student writes what it was taught; only `answer_only` can be imposed on a
    student of another method. `method` is None for a model of unknown making. Raises UserError.
    """
    if method is not None and method not in UNIFIED:
        raise UserError(
            f"a student of method {method} is one half of a pair and solves no problem alone; "
            "give --decomposer and --solver, or --subquestions gold and --solver"
        )
    if mode == "auto":
        if method is None:
            known = ", ".join(SINGLE_MODEL_MODES)
            raise UserError(f"the model does not say by which method it was taught; give mode: {known}")
        return method, False
    if method not in (None, mode) and mode != "answer_only":
        raise UserError(
            f"a student of method {method} cannot be made to write as {mode}; use auto or answer_only"
        )
    return mode, mode == "answer_only" and method != mode


def resolve_pair(students: Mapping[str, ModelReference], guidance_from: str) -> tuple[str, str]:
    """The mode of students that answer together, and what guides the decomposer ("operators", "equations" or "").

    Raises UserError for a student in a part that its method cannot play, and for a plan that nobody writes or reads.
    """
    for part, student in students.items():
        _check_role(part, student)
    if DECOMPOSER not in students:
        return GOLD, ""
    decomposer = students[DECOMPOSER]
    mode = INTERLEAVED if decomposer.method == "socratic" or is_interleaved(str(decomposer.method)) else AHEAD
    needed, planner = guidance_of(str(decomposer.method)), students.get(PLANNER)
    if needed is None:
        if planner or guidance_from == "gold":
            raise UserError(
                f"the decomposer {decomposer.name} is of method {decomposer.method}, which reads no plan; "
                "leave planner and guidance_from out"
            )
        return mode, ""
    if guidance_from == "planner" and planner is None:
        raise UserError(
            f"the decomposer {decomposer.name} is guided by {needed.name.lower()}; give a planner, or guidance_from gold"
        )
    if planner and guidance_of(str(planner.method)) != needed:
        raise UserError(
            f"the planner {planner.name} is of method {planner.method}, but the decomposer {decomposer.name} is guided by "
            f"{needed.name.lower()}"
        )
    return mode, needed.name.lower()


def _check_role(part: str, student: ModelReference) -> None:
    method = student.method
    if method is None:
        raise UserError(
            f"the {part} {student.name} does not say by which method it was taught; give an export of "
            "tools/convert_checkpoint.py"
        )
    able = {
        DECOMPOSER: method == "socratic" or is_decomposer(method),
        SOLVER: method in ("socratic", "solver"),
        PLANNER: is_planner(method),
    }
    if not able[part]:
        playing = {DECOMPOSER: "decomposer* or socratic", SOLVER: "solver or socratic", PLANNER: "planner_*"}
        raise UserError(f"{student.name} is of method {method}; a {part} is of method {playing[part]}")
