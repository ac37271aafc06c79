"""Decoding settings and modes of an evaluation, and the training methods that each role accepts. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.errors import UserError
from trainer.shards.methods import SegmentRole, guidance_of, is_decomposer, is_interleaved, is_planner

if TYPE_CHECKING:
    from trainer.evaluation.model_reference import ModelReference

UNIFIED = ("answer_only", "cot", "socratic")
FEW_SHOT = "few_shot"  # an undistilled model that reads exemplars
SINGLE_MODEL_MODES = (*UNIFIED, FEW_SHOT)
AHEAD, INTERLEAVED, GOLD = "iterative_ahead", "iterative_interleaved", "gold_subquestions"
# Roles; a STUDENT answers alone.
STUDENT, PLANNER, DECOMPOSER, SOLVER = "student", "planner", "decomposer", "solver"


@dataclass(frozen=True)
class Decoding:
    """The fields of `EvaluateSettings` that rollouts depend on; `mode` is resolved (not "auto").

    impose_answer: every text starts with the delimiter, so that a model of another method answers immediately.
    guidance: plan that the decomposer reads, "operators" or "equations". guidance_from: source of the plan, "planner" or
    "gold". Both are "" without a plan.
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
    batch_size: int = 32  # slots per rank

    @property
    def guidance_segment_role(self) -> SegmentRole | None:
        """Segment role of the plan that the decomposer reads."""
        return SegmentRole[self.guidance.upper()] if self.guidance else None

    @property
    def gold_segment_role(self) -> SegmentRole | None:
        """Segment role of the data that a model reads besides the problem."""
        if self.mode == GOLD:
            return SegmentRole.SUBQUESTION
        return self.guidance_segment_role if self.guidance_from == "gold" else None


def resolve_mode(mode: str, method: str | None) -> tuple[str, bool]:
    """Return the mode of a model that answers alone, and whether the answer must be imposed.

    "auto" selects the model's training method. Only `answer_only` can be imposed on a model of another method. `method`:
    None if unknown. Raises UserError if the model cannot answer in this mode.
    """
    if method is not None and method not in UNIFIED:
        raise UserError(
            f"a model of method {method} is one half of a pair and cannot solve problems alone; "
            "give --decomposer and --solver, or --subquestions gold and --solver"
        )
    if mode == "auto":
        if method is None:
            known = ", ".join(SINGLE_MODEL_MODES)
            raise UserError(f"the model does not record its training method; give mode: {known}")
        return method, False
    if method not in (None, mode) and mode != "answer_only":
        raise UserError(f"a model of method {method} cannot answer in mode {mode}; use auto or answer_only")
    return mode, mode == "answer_only" and method != mode


def resolve_pair(models: Mapping[str, ModelReference], guidance_from: str) -> tuple[str, str]:
    """Return the mode of models that answer together, and the decomposer's guidance ("operators", "equations" or "").

    Raises UserError if a model's method does not fit its role, or a plan is missing or would not be read.
    """
    for role, model in models.items():
        method = model.method
        if method is None:
            raise UserError(
                f"the {role} {model.name} does not record its training method; give an export of "
                "tools/convert_checkpoint.py"
            )
        fits, accepted = {
            DECOMPOSER: (method == "socratic" or is_decomposer(method), "decomposer* or socratic"),
            SOLVER: (method in ("socratic", "solver"), "solver or socratic"),
            PLANNER: (is_planner(method), "planner_*"),
        }[role]
        if not fits:
            raise UserError(f"{model.name} is of method {method}; a {role} is of method {accepted}")
    if DECOMPOSER not in models:
        return GOLD, ""
    decomposer = models[DECOMPOSER]
    mode = INTERLEAVED if decomposer.method == "socratic" or is_interleaved(str(decomposer.method)) else AHEAD
    needed, planner = guidance_of(str(decomposer.method)), models.get(PLANNER)
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
