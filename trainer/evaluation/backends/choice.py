"""Which backend decodes a model: the fastest one whose logits are those of the model's own forward pass."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from trainer.errors import UserError
from trainer.evaluation.backend_check import (
    BF16_FACTOR,
    MIN_TOLERANCE,
    MIN_TOLERANCE_BF16,
    BackendError,
    CheckText,
    CheckTexts,
    LogitRecorder,
    Reference,
    decode,
    depends_on_what_follows,
    difference,
    generate_continuation,
)
from trainer.evaluation.backends import AnyRequest, Backend, Sampler
from trainer.evaluation.backends.slots import SlotBackend
from trainer.evaluation.backends.transformers import CACHE_USES, CacheUse, TransformersBackend
from trainer.runtime import malloc

SLOTS, TRANSFORMERS = "slots", "transformers"
PLAIN, GENERATE = "plain forward pass", "generate"
_NUM_SLOTS = {SLOTS: 2, TRANSFORMERS: 4}  # of a check
# Some families compute a decode step by another formula than a whole text (Nemotron-H: 5e-4 in fp32). Where no use of
# the cache is as near as rounding, one this near is taken: it is what `generate` computes, and without a cache every step
# reads the whole text again.
OWN_CACHE_TOLERANCE = 2e-3


@dataclass(frozen=True)
class BackendChoice:
    """A backend for one model, and what the check measured.

    difference: the largest one between the backend's logits and those of `compared_with` (PLAIN or GENERATE), in standard
    deviations of the logits (None: not checked). tolerance: the largest that is taken for rounding. dtype: what both were
    computed in. reason: why not slots, if they were tried.
    """

    name: str
    cache_use: CacheUse = CacheUse()
    difference: float | None = None
    tolerance: float | None = None
    dtype: str = ""
    reason: str = ""
    compared_with: str = PLAIN

    def text(self) -> str:
        """Return one line for the user."""
        if self.name == SLOTS:
            return f"decoding in slots equals the model's own forward pass (difference {self.difference:.0e})"
        how = "and cache" if self.cache_use.cache else "without a cache (slow)"
        batch = "" if self.cache_use.batch else ", one problem at a time"
        if self.compared_with == GENERATE:
            batch += ", as generate does (the logits of a whole text depend on what follows)"
        why = f": {self.reason}" if self.reason else ""
        return f"decoding by the model's own forward pass {how}{batch}{why}"

    @property
    def is_right(self) -> bool:
        """Whether what was measured is rounding."""
        assert self.difference is not None and self.tolerance is not None
        return self.difference <= self.tolerance

    def within(self, tolerance: float) -> BackendChoice | None:
        """Return the choice with another tolerance, None if it is not right with that either."""
        found = dataclasses.replace(self, tolerance=tolerance)
        return found if found.is_right else None

    def record(self) -> dict[str, Any]:
        """Return what results.json says."""
        own = dataclasses.asdict(self.cache_use) if self.name == TRANSFORMERS else None
        return {
            "name": self.name,
            "difference": self.difference,
            "tolerance": self.tolerance,
            "dtype": self.dtype,
            "reason": self.reason,
            "compared_with": self.compared_with,
            "cache_use": own,
        }


UNCHECKED = BackendChoice(SLOTS)


def make_backend(
    choice: BackendChoice,
    seat: int,
    model: PreTrainedModel,
    num_slots: int,
    capacity: int,
    choose: Sampler,
    prefix: Sequence[int] = (),
    num_models: int = 1,
) -> Backend[AnyRequest]:
    """Return the chosen backend for feed `seat`; `num_models`: how many models work at a problem."""
    if choice.name == SLOTS:
        return SlotBackend[AnyRequest](seat, model, num_slots, capacity, choose, prefix)
    # Where problems wait for another model in between, they do not stay equally long.
    use = choice.cache_use if num_models == 1 else dataclasses.replace(choice.cache_use, batch=False)
    return TransformersBackend[AnyRequest](seat, model, num_slots, capacity, choose, prefix, use)


def choose_backend(
    model: PreTrainedModel, texts: CheckTexts, name: str, requested: str = "auto"
) -> BackendChoice:
    """Check backends on `texts`, the fastest first, and return the first one that is right.

    requested: "auto", "slots" or "transformers". name: the model's, for messages. Raises UserError if none is right, if
    the requested one is not, and for weights that are not finite.
    """
    reasons: list[str] = []
    own = [BackendChoice(TRANSFORMERS, use) for use in CACHE_USES] if requested != SLOTS else []
    checks = _BackendChecks(model)
    nearest: BackendChoice | None = None
    for candidate in [*([BackendChoice(SLOTS)] if requested != TRANSFORMERS else []), *own]:
        if nearest is not None and not candidate.cache_use.cache:
            break
        checked = checks.measured(candidate, texts, reasons)
        if checked is not None and checked.is_right:
            return dataclasses.replace(checked, reason=_slots_reason(requested, reasons))
        if nearest is None and checked is not None and candidate.name == TRANSFORMERS:
            nearest = checked.within(OWN_CACHE_TOLERANCE)
    if nearest is not None:
        return dataclasses.replace(nearest, reason=_slots_reason(requested, reasons))
    if own and (checked := checks.as_generate(texts, reasons)):
        return dataclasses.replace(checked, reason=_slots_reason(requested, reasons))
    if requested == SLOTS:
        raise UserError(
            f"{name} cannot be decoded in slots: {reasons[0]}; use backend auto, which decodes it by its own forward pass "
            "if that is right"
        )
    raise UserError(
        f"{name} ({type(model).__name__}) cannot be evaluated: decoded by its own forward pass, {reasons[-1]}; "
        "choose another model, or another release of transformers"
    )


def _slots_reason(requested: str, reasons: Sequence[str]) -> str:
    return f"in slots {reasons[0]}" if requested != TRANSFORMERS and reasons else ""


class _BackendChecks:
    """Checks of one model: references are computed once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._references: dict[str, Reference] = {}

    def measured(
        self, candidate: BackendChoice, texts: CheckTexts, reasons: list[str]
    ) -> BackendChoice | None:
        """Return the candidate with what was measured, None if it cannot run; if it is not right, add the reason."""
        try:
            checked = self.check(candidate, texts)
        except BackendError as finding:
            reasons.append(str(finding))
            return None
        assert checked.difference is not None and checked.tolerance is not None
        if not checked.is_right:
            reasons.append(
                f"its logits differ from those of the plain forward pass by {checked.difference:.1e} standard deviations "
                f"({checked.tolerance:.0e} would be rounding)"
            )
        return checked

    def as_generate(self, texts: CheckTexts, reasons: list[str]) -> BackendChoice | None:
        """Return the own cache, one problem at a time, if `generate` is the only measure and it equals that."""
        candidate = BackendChoice(TRANSFORMERS, next(use for use in CACHE_USES if not use.batch))
        try:
            if not any(depends_on_what_follows(self._model, text) for text in texts.own_cache):
                return None
            made = [generate_continuation(self._model, text) for text in texts.own_cache]
            ours = [text for text, _ in made]
            found = difference(self._decode(candidate, texts, ours), [logits for _, logits in made])
        except BackendError as finding:
            reasons.append(str(finding))
            return None
        reasons.append(f"its logits differ from those of generate by {found:.1e} standard deviations")
        dtype = "bf16" if _is_16_bit(self._model) else "fp32"
        checked = dataclasses.replace(
            candidate, difference=found, tolerance=MIN_TOLERANCE, dtype=dtype, compared_with=GENERATE
        )
        return checked if found <= MIN_TOLERANCE else None

    def check(self, candidate: BackendChoice, texts: CheckTexts) -> BackendChoice:
        """Return the candidate with what was measured. Raises CannotRun and UserError."""
        ours = texts.slots if candidate.name == SLOTS else texts.own_cache
        if not _is_16_bit(self._model):
            return self._check_as_loaded(candidate, texts, ours)
        if not fits_in_fp32(self._model):
            return self._check_as_loaded(candidate, texts, ours, MIN_TOLERANCE_BF16)
        with in_fp32(self._model):
            checked = self._check_as_loaded(candidate, texts, ours)
            assert checked.difference is not None and checked.tolerance is not None
            if checked.difference > checked.tolerance:
                return checked
            exact = self._reference("fp32").logits(ours)
        # The kernels for 16 bits are others: they must come as near to fp32 as the plain forward pass does.
        own = difference(self._reference("bf16").logits(ours), exact)
        tolerance = max(MIN_TOLERANCE_BF16, BF16_FACTOR * own)
        found = difference(self._decode(candidate, texts, ours), exact)
        if found <= tolerance:
            return checked
        return dataclasses.replace(checked, difference=found, tolerance=tolerance, dtype="bf16")

    def _check_as_loaded(
        self, candidate: BackendChoice, texts: CheckTexts, ours: Sequence[CheckText], at_least: float = 0.0
    ) -> BackendChoice:
        dtype = "bf16" if _is_16_bit(self._model) else "fp32"
        reference = self._reference(dtype)
        found = difference(self._decode(candidate, texts, ours), reference.logits(ours))
        tolerance = reference.tolerance(ours, found, at_least)
        return dataclasses.replace(candidate, difference=found, tolerance=tolerance, dtype=dtype)

    def _reference(self, dtype: str) -> Reference:
        return self._references.setdefault(dtype, Reference(self._model))

    def _decode(
        self, candidate: BackendChoice, texts: CheckTexts, ours: Sequence[CheckText]
    ) -> list[torch.Tensor]:
        recorder, num_slots = LogitRecorder(ours), _NUM_SLOTS[candidate.name]

        def make() -> Backend[Any]:
            arguments = (0, self._model, num_slots, texts.capacity, recorder.choose, texts.prefix)
            return make_backend(candidate, *arguments)

        return decode(make, recorder, num_slots)


def _is_16_bit(model: PreTrainedModel) -> bool:
    return model.dtype in (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def in_fp32(model: PreTrainedModel) -> Iterator[None]:
    """Context manager in which the weights and buffers of a model are fp32 copies of themselves."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def fits_in_fp32(model: PreTrainedModel) -> bool:
    """Return whether the device has memory for fp32 copies of the weights (on a CPU twice: blocked ones as well)."""
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    if model.device.type == "cuda":
        reserved = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        return needed < 0.8 * (torch.cuda.mem_get_info(model.device)[0] + reserved)
    return 2 * needed < 0.8 * malloc.available_bytes()
