"""Choose a model's backend: the fastest one whose logits equal those of the model's own forward pass."""

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
    CheckRequest,
    CheckText,
    CheckTexts,
    LogitRecorder,
    ReferenceLogits,
    depends_on_later_tokens,
    difference,
    generate_continuation,
    raise_backend_error,
)
from trainer.evaluation.backends import AnyRequest, Backend, Sampler
from trainer.evaluation.backends.slots import SlotBackend
from trainer.evaluation.backends.transformers import CACHE_USES, CacheUse, TransformersBackend
from trainer.evaluation.generate import generate
from trainer.runtime import malloc

SLOTS, TRANSFORMERS = "slots", "transformers"
PLAIN, GENERATE = "plain forward pass", "generate"
_NUM_SLOTS = {SLOTS: 2, TRANSFORMERS: 4}  # in a check
# Some families compute a decode step by another formula than a whole text (Nemotron-H: 5e-4 in fp32). If no use of the
# cache is within rounding, a use within this tolerance is chosen: `generate` computes the same, and decoding without a
# cache is slow.
OWN_CACHE_TOLERANCE = 2e-3


@dataclass(frozen=True)
class BackendChoice:
    """A backend for one model, and the result of its check.

    difference: maximum difference between the backend's logits and those of `compared_with` (PLAIN or GENERATE), in
    standard deviations of the logits; None if not checked. tolerance: maximum difference that counts as rounding. dtype:
    that of both computations. reason: why the slot backend was rejected, if it was tried.
    """

    name: str
    cache_use: CacheUse = CacheUse()
    difference: float | None = None
    tolerance: float | None = None
    dtype: str = ""
    reason: str = ""
    compared_with: str = PLAIN

    def describe(self) -> str:
        """Return the choice as one log line."""
        if self.name == SLOTS:
            return f"decoding in slots equals the model's own forward pass (difference {self.difference:.0e})"
        cache = "and cache" if self.cache_use.cache else "without a cache (slow)"
        batch = "" if self.cache_use.batch else ", one problem at a time"
        if self.compared_with == GENERATE:
            batch += ", as generate does (the logits of a whole text depend on later tokens)"
        why = f": {self.reason}" if self.reason else ""
        return f"decoding by the model's own forward pass {cache}{batch}{why}"

    @property
    def is_within_tolerance(self) -> bool:
        assert self.difference is not None and self.tolerance is not None
        return self.difference <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of results.json."""
        fields = dataclasses.asdict(self)
        cache_use = fields.pop("cache_use")
        return {**fields, "cache_use": cache_use if self.name == TRANSFORMERS else None}


UNCHECKED = BackendChoice(SLOTS)


def make_backend(
    choice: BackendChoice,
    model_number: int,
    model: PreTrainedModel,
    num_slots: int,
    capacity: int,
    sampler: Sampler,
    prefix: Sequence[int] = (),
    num_models: int = 1,
) -> Backend[AnyRequest]:
    """Return the chosen backend. `model_number`: number of the model in requests; `num_models`: models per request."""
    if choice.name == SLOTS:
        return SlotBackend[AnyRequest](model_number, model, num_slots, capacity, sampler, prefix)
    # Sequences that also wait for another model do not keep the same length, which batches require.
    use = choice.cache_use if num_models == 1 else dataclasses.replace(choice.cache_use, batch=False)
    return TransformersBackend[AnyRequest](model_number, model, num_slots, capacity, sampler, prefix, use)


def choose_backend(
    model: PreTrainedModel, texts: CheckTexts, name: str, requested: str = "auto"
) -> BackendChoice:
    """Check backends on `texts`, the fastest first, and return the first one that passes.

    requested: "auto", "slots" or "transformers". name: the model's name in messages. Raises UserError if no backend, or
    not the requested one, passes, and for weights that are not finite.
    """
    reasons: list[str] = []
    checks = _BackendChecks(model, texts)
    candidates = [BackendChoice(SLOTS)] if requested != TRANSFORMERS else []
    if requested != SLOTS:
        candidates += [BackendChoice(TRANSFORMERS, use) for use in CACHE_USES]
    chosen: BackendChoice | None = None
    nearest: BackendChoice | None = None
    for candidate in candidates:
        if nearest is not None and not candidate.cache_use.cache:
            break
        try:
            checked = checks.check(candidate)
        except BackendError as error:
            reasons.append(str(error))
            continue
        if checked.is_within_tolerance:
            chosen = checked
            break
        reasons.append(
            f"its logits differ from those of the plain forward pass by {checked.difference:.1e} standard deviations "
            f"({checked.tolerance:.0e} would be rounding)"
        )
        tolerant = dataclasses.replace(checked, tolerance=OWN_CACHE_TOLERANCE)
        if nearest is None and candidate.name == TRANSFORMERS and tolerant.is_within_tolerance:
            nearest = tolerant
    chosen = chosen or nearest
    if chosen is None and requested != SLOTS:
        chosen = checks.compare_with_generate(reasons)
    if chosen is not None:
        is_slots_rejected = requested != TRANSFORMERS and bool(reasons)
        return dataclasses.replace(chosen, reason=f"in slots {reasons[0]}" if is_slots_rejected else "")
    if requested == SLOTS:
        raise UserError(
            f"{name} cannot be decoded in slots: {reasons[0]}; use backend auto, which decodes it by its own forward pass "
            "if that is right"
        )
    raise UserError(
        f"{name} ({type(model).__name__}) cannot be evaluated: decoded by its own forward pass, {reasons[-1]}; "
        "choose another model, or another release of transformers"
    )


class _BackendChecks:
    """Checks of one model, which share the reference logits."""

    def __init__(self, model: PreTrainedModel, texts: CheckTexts) -> None:
        self._model, self._texts = model, texts
        self._reference = ReferenceLogits(model)

    def compare_with_generate(self, reasons: list[str]) -> BackendChoice | None:
        """Return the transformers backend without batching, checked against `generate` instead of plain logits.

        None if the plain logits do not depend on later tokens, or if the backend differs from `generate`.
        """
        candidate = BackendChoice(TRANSFORMERS, next(use for use in CACHE_USES if not use.batch))
        texts = self._texts.own_cache
        try:
            if not any(depends_on_later_tokens(self._model, text) for text in texts):
                return None
            generated = [generate_continuation(self._model, text) for text in texts]
            logits = self._decode(candidate, [text for text, _ in generated])
            found = difference(logits, [expected for _, expected in generated])
        except BackendError as error:
            reasons.append(str(error))
            return None
        reasons.append(f"its logits differ from those of generate by {found:.1e} standard deviations")
        checked = self._checked(candidate, found, MIN_TOLERANCE)
        return dataclasses.replace(checked, compared_with=GENERATE) if checked.is_within_tolerance else None

    def check(self, candidate: BackendChoice) -> BackendChoice:
        """Return the candidate with its measured difference. Raises BackendError and UserError."""
        texts = self._texts.slots if candidate.name == SLOTS else self._texts.own_cache
        if not _is_16_bit(self._model):
            return self._check_as_loaded(candidate, texts, MIN_TOLERANCE)
        if not _fits_in_fp32(self._model):
            return self._check_as_loaded(candidate, texts, MIN_TOLERANCE_BF16)
        with _in_fp32(self._model):
            checked = self._check_as_loaded(candidate, texts, MIN_TOLERANCE)
            if not checked.is_within_tolerance:
                return checked
            exact = self._reference.logits(texts)
        # 16-bit kernels differ from fp32 ones: their error must be about that of the plain forward pass.
        plain_error = difference(self._reference.logits(texts), exact)
        tolerance = max(MIN_TOLERANCE_BF16, BF16_FACTOR * plain_error)
        found = difference(self._decode(candidate, texts), exact)
        return checked if found <= tolerance else self._checked(candidate, found, tolerance)

    def _check_as_loaded(
        self, candidate: BackendChoice, texts: Sequence[CheckText], smallest: float
    ) -> BackendChoice:
        found = difference(self._decode(candidate, texts), self._reference.logits(texts))
        return self._checked(candidate, found, self._reference.tolerance(texts, found, smallest))

    def _checked(self, candidate: BackendChoice, found: float, tolerance: float) -> BackendChoice:
        dtype = "bf16" if _is_16_bit(self._model) else "fp32"
        return dataclasses.replace(candidate, difference=found, tolerance=tolerance, dtype=dtype)

    def _decode(self, candidate: BackendChoice, texts: Sequence[CheckText]) -> list[torch.Tensor]:
        """Return for each text the backend's logits [choices, vocabulary], fp32 on the CPU. Raises BackendError."""
        recorder, num_slots = LogitRecorder(texts), _NUM_SLOTS[candidate.name]
        with raise_backend_error():
            backend: Backend[CheckRequest] = make_backend(
                candidate, 0, self._model, num_slots, self._texts.capacity, recorder, self._texts.prefix
            )
            for _ in generate([backend], iter(recorder.requests), CheckRequest.on_token, num_slots):
                pass
        return [torch.stack(request.logits) for request in recorder.requests]


def _is_16_bit(model: PreTrainedModel) -> bool:
    return model.dtype in (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def _in_fp32(model: PreTrainedModel) -> Iterator[None]:
    """Context manager that replaces the weights and buffers of a model by fp32 copies."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def _fits_in_fp32(model: PreTrainedModel) -> bool:
    """Return whether the device has memory for fp32 copies of the weights (two on a CPU, with the prepacked one)."""
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    if model.device.type == "cuda":
        reserved = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        return needed < 0.8 * (torch.cuda.mem_get_info(model.device)[0] + reserved)
    return 2 * needed < 0.8 * malloc.available_bytes()
