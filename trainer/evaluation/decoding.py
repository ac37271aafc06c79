"""Decoding settings, and checks of modes and training methods. This module imports neither torch nor transformers."""

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.errors import UserError
from trainer.evaluation.model_reference import ModelReference
from trainer.settings import FEW_SHOT
from trainer.shards.methods import SegmentRole, guidance_of, is_decomposer, is_interleaved, is_planner

UNIFIED = ("answer_only", "cot", "socratic")
SINGLE_MODEL_MODES = (*UNIFIED, FEW_SHOT)
AHEAD, INTERLEAVED, GOLD = "iterative_ahead", "iterative_interleaved", "gold_subquestions"
# Roles of models. A STUDENT solves problems alone.
STUDENT, PLANNER, DECOMPOSER, SOLVER = "student", "planner", "decomposer", "solver"


@dataclass(frozen=True)
class Decoding:
    """Settings that rollouts depend on. `EvaluateSettings` explains most of them. `mode` is never "auto".

    impose_answer: if True, the delimiter `####` is put before every generated text, so that a model that was trained to
    write steps writes only the answer. guidance: kind of plan that the decomposer reads, "operators" or "equations".
    guidance_from: source of the plan, "planner" or "gold". `guidance` and `guidance_from` are "" if there is no plan.
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
        """Segment role of the plan that the decomposer reads; None if there is no plan."""
        return SegmentRole[self.guidance.upper()] if self.guidance else None

    @property
    def gold_segment_role(self) -> SegmentRole | None:
        """Role of the gold segments (sub-questions or plan) that a model reads; None if no model reads gold segments."""
        if self.mode == GOLD:
            return SegmentRole.SUBQUESTION
        return self.guidance_segment_role if self.guidance_from == "gold" else None


def resolve_mode(mode: str, method: str | None) -> tuple[str, bool]:
    """Return the mode of a model that answers alone, and whether its answer must be imposed (see `Decoding`).

    method: the model's training method; None: unknown. mode: the requested mode; "auto": the mode named like the method. In
    mode `answer_only`, the answer is imposed unless the model's method is `answer_only`. Raises UserError if a model of
    this method cannot answer in this mode, or if mode is "auto" and the method is unknown.
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

    models: role -> model. guidance_from: source of the plan, "planner" or "gold". Raises UserError if a model's method is
    unknown or does not fit its role. Raises UserError if a decomposer that reads a plan has no source of plans or a planner
    for another kind of plan, or if a decomposer that reads no plan has a planner or gold guidance.
    """
    for role, model in models.items():
        method = model.method
        if method is None:
            raise UserError(
                f"the {role} {model.name} does not record its training method; give an export of "
                "tools/convert_checkpoint.py"
            )
        is_accepted, accepted_methods = {
            DECOMPOSER: (method == "socratic" or is_decomposer(method), "decomposer* or socratic"),
            SOLVER: (method in ("socratic", "solver"), "solver or socratic"),
            PLANNER: (is_planner(method), "planner_*"),
        }[role]
        if not is_accepted:
            raise UserError(f"{model.name} is of method {method}; a {role} is of method {accepted_methods}")
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
