"""Choose a model's backend: the fastest backend whose logits agree with those of the model's own forward pass."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from trainer.errors import UserError
from trainer.evaluation import backend_check
from trainer.evaluation.backend_check import CheckText, CheckTexts
from trainer.evaluation.backends import AnyRequest, Backend, Sampler
from trainer.evaluation.backends.slots import SlotBackend
from trainer.evaluation.backends.transformers import CACHE_USES, CacheUse, TransformersBackend
from trainer.evaluation.generate import generate
from trainer.models import load
from trainer.runtime import malloc

SLOTS, TRANSFORMERS = "slots", "transformers"
PLAIN, GENERATE = "plain forward pass", "generate"
_NUM_SLOTS = {SLOTS: 2, TRANSFORMERS: 4}  # number of slots in a check, by backend
# If no backend with a cache passes the check, the transformers backend is accepted within this larger tolerance, in standard
# deviations of the logits. Some model families compute a decode step and a forward pass over the whole text by different
# formulas: in Nemotron-H, fp32 logits differ by 5e-4, also in `generate`. Without a cache, decoding would be slow.
OWN_CACHE_TOLERANCE = 2e-3


@dataclass(frozen=True)
class BackendChoice:
    """A backend for one model, and the result of its check.

    difference: maximum difference between the backend's logits and the logits of `compared_with` (PLAIN or GENERATE), in
    standard deviations of the logits; None if the backend was not checked. tolerance: maximum accepted `difference`.
    dtype: the model's dtype in the check, "fp32" or "bf16" (for all 16-bit dtypes). reason: the reason why the slot backend
    was rejected; "" if the slot backend was accepted or not checked.
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
        """Return the fields that results.json stores for this choice."""
        fields = dataclasses.asdict(self)
        cache_use = fields.pop("cache_use")
        return {**fields, "cache_use": cache_use if self.name == TRANSFORMERS else None}


UNCHECKED = BackendChoice(SLOTS)


def make_backend(
    choice: BackendChoice,
    model_index: int,
    model: PreTrainedModel,
    num_slots: int,
    capacity: int,
    sampler: Sampler,
    prefix: Sequence[int] = (),
    num_models: int = 1,
) -> Backend[AnyRequest]:
    """Return the chosen backend. `num_models`: number of models per request. `Backend` explains the other arguments."""
    if choice.name == SLOTS:
        return SlotBackend[AnyRequest](model_index, model, num_slots, capacity, sampler, prefix)
    # All rows of a batch advance together, so a request that alternates between models must not be batched.
    use = choice.cache_use if num_models == 1 else dataclasses.replace(choice.cache_use, batch=False)
    return TransformersBackend[AnyRequest](model_index, model, num_slots, capacity, sampler, prefix, use)


def choose_backend(
    model: PreTrainedModel, texts: CheckTexts, name: str, requested: str = "auto"
) -> BackendChoice:
    """Check backends on `texts`, the fastest first, and return the first backend that passes.

    requested: "slots", "transformers", or "auto" to check both. name: the model's name in messages. If no backend with
    a cache passes, the transformers backend within `OWN_CACHE_TOLERANCE` is accepted, then a backend without a cache, then
    one that agrees with `generate`. Raises UserError if no requested backend is accepted, or if logits are not finite.
    """
    reasons: list[str] = []
    checks = _BackendChecks(model, texts)
    candidates = [BackendChoice(SLOTS), *(BackendChoice(TRANSFORMERS, use) for use in CACHE_USES)]
    chosen = within_own_tolerance = None
    for candidate in candidates:
        if requested not in ("auto", candidate.name):
            continue
        if within_own_tolerance is not None and not candidate.cache_use.cache:
            break
        try:
            checked = checks.check(candidate)
        except backend_check.BackendError as error:
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
        if candidate.name == TRANSFORMERS and tolerant.is_within_tolerance:
            within_own_tolerance = within_own_tolerance or tolerant
    chosen = chosen or within_own_tolerance
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
    """Checks of backends for one model. The checks share a cache of the plain logits."""

    def __init__(self, model: PreTrainedModel, texts: CheckTexts) -> None:
        self._model, self._texts = model, texts
        self._reference = backend_check.ReferenceLogits(model)

    def compare_with_generate(self, reasons: list[str]) -> BackendChoice | None:
        """Return the transformers backend without batching if its logits agree with those of `generate`, else None.

        Append the result of the comparison to `reasons`. Return None without a comparison if the plain logits do not depend
        on later tokens. In this case, the plain logits are a valid reference, which no checked backend has matched.
        """
        candidate = BackendChoice(TRANSFORMERS, next(use for use in CACHE_USES if not use.batch))
        texts = self._texts.own_cache
        try:
            if not any(backend_check.depends_on_later_tokens(self._model, text) for text in texts):
                return None
            generated = [backend_check.generate_continuation(self._model, text) for text in texts]
            logits = self._decode(candidate, [text for text, _ in generated])
            measured = backend_check.difference(logits, [expected for _, expected in generated])
        except backend_check.BackendError as error:
            reasons.append(str(error))
            return None
        reasons.append(f"its logits differ from those of generate by {measured:.1e} standard deviations")
        checked = self._checked(candidate, measured, backend_check.MIN_TOLERANCE)
        return dataclasses.replace(checked, compared_with=GENERATE) if checked.is_within_tolerance else None

    def check(self, candidate: BackendChoice) -> BackendChoice:
        """Return the candidate with its difference, tolerance and dtype. Raises BackendError if a forward pass fails."""
        texts = self._texts.slots if candidate.name == SLOTS else self._texts.own_cache
        is_16_bit = _is_16_bit(self._model)
        if not is_16_bit or not _fits_in_fp32(self._model):
            min_tolerance = backend_check.MIN_TOLERANCE_BF16 if is_16_bit else backend_check.MIN_TOLERANCE
            return self._check_as_loaded(candidate, texts, min_tolerance)
        tensors = (*self._model.parameters(), *self._model.buffers())
        with load.data_in_dtypes([(t, torch.float32) for t in tensors if t.is_floating_point()]):
            checked = self._check_as_loaded(candidate, texts, backend_check.MIN_TOLERANCE)
            if not checked.is_within_tolerance:
                return checked
            exact = self._reference.logits(texts)
        # Check the 16-bit kernels too: the backend's error against fp32 must be similar to the plain forward pass's error.
        plain_error = backend_check.difference(self._reference.logits(texts), exact)
        tolerance = max(backend_check.MIN_TOLERANCE_BF16, backend_check.BF16_FACTOR * plain_error)
        measured = backend_check.difference(self._decode(candidate, texts), exact)
        return checked if measured <= tolerance else self._checked(candidate, measured, tolerance)

    def _check_as_loaded(
        self, candidate: BackendChoice, texts: Sequence[CheckText], min_tolerance: float
    ) -> BackendChoice:
        measured = backend_check.difference(self._decode(candidate, texts), self._reference.logits(texts))
        tolerance = self._reference.tolerance(texts, measured, min_tolerance)
        return self._checked(candidate, measured, tolerance)

    def _checked(self, candidate: BackendChoice, measured: float, tolerance: float) -> BackendChoice:
        dtype = "bf16" if _is_16_bit(self._model) else "fp32"
        return dataclasses.replace(candidate, difference=measured, tolerance=tolerance, dtype=dtype)

    def _decode(self, candidate: BackendChoice, texts: Sequence[CheckText]) -> list[torch.Tensor]:
        """Return the backend's logits [choices, vocabulary] of each text. Raises BackendError if decoding fails."""
        recorder, num_slots = backend_check.LogitRecorder(texts), _NUM_SLOTS[candidate.name]
        with backend_check.raise_backend_error():
            backend: Backend[backend_check.CheckRequest] = make_backend(
                candidate, 0, self._model, num_slots, self._texts.capacity, recorder, self._texts.prefix
            )
            list(generate([backend], iter(recorder.requests), backend_check.CheckRequest.on_token, num_slots))
        return [torch.stack(request.logits) for request in recorder.requests]


def _is_16_bit(model: PreTrainedModel) -> bool:
    return model.dtype in (torch.bfloat16, torch.float16)


def _fits_in_fp32(model: PreTrainedModel) -> bool:
    """Return whether an fp32 copy of the weights fits into the free memory. On a CPU, a prepacked fp32 copy must fit too."""
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    if model.device.type == "cuda":
        reserved = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        return needed < 0.8 * (torch.cuda.mem_get_info(model.device)[0] + reserved)
    return 2 * needed < 0.8 * malloc.available_bytes()
