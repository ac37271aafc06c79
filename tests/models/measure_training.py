"""Compare loss and gradients of the training layouts with transformers: one example at a time, default attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from tests.models.row import FALLBACK, OK, REFUSED, WRONG, Cell
from tests.models.small_configs import VOCABULARY
from trainer.models import load, training_kernels
from trainer.models.default_attention import set_attention
from trainer.training.batches import MicroBatch
from trainer.training.layout_check import Example, NoLayout, choose_layout
from trainer.training.layouts import PACKED, PADDED, BatchLayout, candidates, split_into_batches
from trainer.training.loss import summed_token_loss

LENGTHS = (40, 57, 23, 23, 9)  # tokens; two are equal
_PROMPT = 5  # tokens without loss
_MAX_LOSS_ERROR = 1e-5  # relative
# Relative; or the multiple of the error of transformers' own gradients against fp64, up to the limit.
_MAX_GRADIENT_ERROR, _ROUNDING_MULTIPLE, _GRADIENT_ERROR_LIMIT = 1e-4, 4, 1e-2
CPU = torch.device("cpu")

Gradients = dict[str, torch.Tensor]


@dataclass
class Reference:
    """Expected loss and gradients, or the error with which transformers fails; then training must be refused."""

    loss: float = 0.0  # summed, in nats
    gradients: Gradients = field(default_factory=dict)
    max_gradient_error: float = 0.0  # relative
    failure: str = ""


def examples(lengths: Sequence[int] = LENGTHS) -> list[Example]:
    """Return random examples: (tokens int64 [n], learned bool [n])."""
    random = np.random.default_rng(0)
    made = []
    for length in lengths:
        tokens = random.integers(1, VOCABULARY - 20, length)
        made.append((tokens, np.arange(length) >= _PROMPT))
    return made


def reference(model: Any, batch: Sequence[Example]) -> Reference:
    """Return loss and gradients of transformers' own forward pass, one example at a time."""
    try:
        loss, gradients = _of(model, lambda: _plain_loss(model, batch))
    except RuntimeError as error:
        return Reference(failure=str(error).partition("\n")[0])
    rounding = 0.0
    try:
        _, exact = _of(model.double(), lambda: _plain_loss(model, batch))
        rounding = distance({name: gradient.double() for name, gradient in gradients.items()}, exact)
    except RuntimeError:  # some families compute parts in fp32 whatever the weights are
        model.zero_grad()
    model.float()
    max_error = min(max(_MAX_GRADIENT_ERROR, _ROUNDING_MULTIPLE * rounding), _GRADIENT_ERROR_LIMIT)
    return Reference(loss, gradients, max_error)


def measure(folder: str, packing: str, batch: list[Example], wanted: Reference) -> Cell:
    """Load the model as training does, choose a layout, and compare its loss and gradients with `wanted`."""
    config = load.load_config(folder)
    model: Any = load.load_model(folder, "fp32", config=config).eval()
    training_kernels.patch_kernels(model, on_accelerator=False)
    try:
        choice = choose_layout(model, candidates(config, packing), batch, CPU)
    except NoLayout as error:
        return Cell(REFUSED, reason=str(error))
    if wanted.failure:
        return Cell(WRONG, "trained although transformers itself fails", wanted.failure)
    loss, gradients = _in_layout(model, choice.layout, batch)
    loss_error = abs(loss - wanted.loss) / abs(wanted.loss)
    gradient_error = distance(gradients, wanted.gradients)
    right = loss_error <= _MAX_LOSS_ERROR and gradient_error <= wanted.max_gradient_error
    fastest = PACKED if packing == "auto" else PADDED
    status = (OK if choice.layout.arrangement == fastest else FALLBACK) if right else WRONG
    detail = choice.layout.arrangement
    if not right:
        detail += f": loss off {loss_error:.0e}, gradient off {gradient_error:.0e}"
    return Cell(status, detail, choice.fallback_reason)


def distance(found: Gradients, wanted: Gradients) -> float:
    """Return the norm of the difference of gradients, relative to the norm of `wanted`."""
    difference = total = 0.0
    for name, gradient in wanted.items():
        ours = found.get(name)
        off = gradient if ours is None else ours - gradient
        difference += float(off.double().square().sum())
        total += float(gradient.double().square().sum())
    return (difference / total) ** 0.5 if total else float("inf")


def _plain_loss(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    losses = []
    without_cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    for tokens, learned in batch:
        ids = torch.from_numpy(tokens)
        logits = model(input_ids=ids[None], **without_cache).logits[0, :-1]
        counted = torch.from_numpy(learned[1:])
        losses.append(cross_entropy(logits[counted].float(), ids[1:][counted], reduction="sum"))
    return torch.stack(losses).sum()


def _in_layout(model: Any, layout: BatchLayout, batch: list[Example]) -> tuple[float, Gradients]:
    set_attention(model, layout.attention)
    passes = split_into_batches(MicroBatch(0, [], batch), layout, CPU)
    return _of(model, lambda: torch.stack([summed_token_loss(model, rows) for rows in passes]).sum())


def _of(model: Any, compute: Callable[[], torch.Tensor]) -> tuple[float, Gradients]:
    model.zero_grad()
    loss = compute()
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return float(loss.detach()), gradients
