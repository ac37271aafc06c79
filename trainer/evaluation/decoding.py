"""How a student is made to write. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.errors import UserError

UNIFIED = ("answer_only", "cot", "socratic")


@dataclass(frozen=True)
class Decoding:
    """The fields of `EvaluateSettings` that a solution depends on; `mode` is a resolved one.

    impose_answer: every solution begins with the delimiter, so that a student of another method answers at once.
    """

    mode: str
    impose_answer: bool = False
    calculator: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256
    batch_size: int = 32  # slots of a rank


def resolve_mode(mode: str, method: str | None) -> tuple[str, bool]:
    """The mode of an evaluation, and whether it has to be imposed on the student.

    "auto" is the student's own method. A student writes what it was taught; only `answer_only` can be imposed on a
    student of another method. `method` is None for a model of unknown making. Raises UserError.
    """
    if method is not None and method not in UNIFIED:
        raise UserError(f"a student of method {method} is one half of a pair and solves no problem alone")
    if mode == "auto":
        if method is None:
            known = ", ".join(UNIFIED)
            raise UserError(f"the model does not say by which method it was taught; give mode: {known}")
        return method, False
    if method not in (None, mode) and mode != "answer_only":
        raise UserError(
            f"a student of method {method} cannot be made to write as {mode}; use auto or answer_only"
        )
    return mode, mode == "answer_only" and method != mode
