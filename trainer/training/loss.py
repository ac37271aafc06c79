"""The loss of one forward pass over packed or padded rows.

The loss of a step is the sum of the token losses over all ranks divided by the number of target tokens of the whole
step, counted before the forward passes. DeepSpeed averages gradients over ranks, so `loop.optimizer_step` multiplies by
the world size. (The mean over ranks of per-rank means is wrong when answers differ in length: 122 % gradient error on a
two-rank case.)
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.models import packed_attention
from trainer.training.batches import MicroBatch
from trainer.training.cross_entropy import summed_cross_entropy

IGNORED = -100  # a label that carries no loss (torch's and transformers' convention)


@dataclass(frozen=True)
class PackedBatch:
    """One row of whole examples: tokens [1, T]; positions [1, T], from 0 in each example; lengths of the examples.

    cu_seqlens [examples + 1]: cumulative lengths, int32. target_positions [L]: positions that predict a target token.
    labels [L]: the target tokens. has_targets: False if there is none; L is then 1, with a dummy label.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]
    cu_seqlens: torch.Tensor
    target_positions: torch.Tensor
    labels: torch.Tensor
    has_targets: bool


@dataclass(frozen=True)
class PaddedBatch:
    """One row per example: tokens [B, T], attention_mask [B, T] (None if all rows are full).

    columns [C]: positions at which any row predicts a target token. rows [L], column_indices [L]: row and index into `columns`
    of each target token. labels [L]: the target tokens. has_targets: as in `PackedBatch`.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor | None
    columns: torch.Tensor
    rows: torch.Tensor
    column_indices: torch.Tensor
    labels: torch.Tensor
    has_targets: bool


def collate(batch: MicroBatch, packing: bool, device: torch.device) -> PackedBatch | PaddedBatch:
    """Return the examples as tensors on the device. An empty batch becomes two tokens without loss.

    (A rank without data in the last step still takes part in every collective of the forward and backward pass.)
    """
    examples = batch.examples or [(np.zeros(2, np.int64), np.zeros(2, bool))]
    targets = [np.where(loss_mask[1:], tokens[1:], IGNORED) for tokens, loss_mask in examples]
    if packing:
        return _pack([tokens for tokens, _ in examples], targets, device)
    return _pad([tokens for tokens, _ in examples], targets, device)


def summed_token_loss(model: torch.nn.Module, batch: PackedBatch | PaddedBatch) -> torch.Tensor:
    """Return the sum of the losses of the target tokens in nats (fp32, differentiable)."""
    losses = summed_cross_entropy(target_logits(model, batch), batch.labels)
    return losses if batch.has_targets else losses * 0


def target_logits(model: torch.nn.Module, batch: PackedBatch | PaddedBatch) -> torch.Tensor:
    """Return the logits [L, vocabulary] that predict the target tokens, in the order of the examples.

    `model`: a causal LM of transformers, or the engine around it.
    """
    if isinstance(batch, PackedBatch):
        return packed_logits(model, batch, **_boundaries(model, batch))
    module: Any = getattr(model, "module", model)
    accepted = _accepted_arguments(type(module))  # type: ignore[arg-type]
    arguments: dict[str, Any] = {"use_cache": False, "logits_to_keep": batch.columns}
    arguments = {name: value for name, value in arguments.items() if name in accepted or not accepted}
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask, **arguments).logits
    if logits.shape[1] != len(batch.columns):  # the family computes all
        logits = logits[:, batch.columns]
    return logits[batch.rows, batch.column_indices]  # type: ignore[no-any-return]


@functools.cache
def _accepted_arguments(model_class: type[Any]) -> frozenset[str]:
    """Return the argument names of a model's `forward`; empty if it takes any keyword."""
    parameters = inspect.signature(model_class.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return frozenset() if takes_any else frozenset(parameters)


def _boundaries(model: torch.nn.Module, batch: PackedBatch) -> dict[str, torch.Tensor]:
    """Return the arguments with which kernels of recurrent and convolutional layers separate the examples of a pack.

    `seq_idx` (int32 [1, T]: the example of each token) for causal_conv1d and mamba_ssm, `cu_seq_lens_q` for
    flash-linear-attention, as in transformers' DataCollatorWithFlattening. Empty unless the kernels are installed:
    transformers' torch versions of these layers raise an exception for either. Never run with the kernels: the check
    before the first step (layout_check.py) decides whether the result is right.
    """
    # All hybrids whose kernels take boundaries have short convolutions.
    if not _has_recurrent_kernels() or not any(isinstance(m, torch.nn.Conv1d) for m in model.modules()):
        return {}
    lengths = torch.tensor(batch.lengths, device=batch.tokens.device)
    examples = torch.arange(len(batch.lengths), dtype=torch.int32, device=batch.tokens.device)
    return {"seq_idx": examples.repeat_interleave(lengths).unsqueeze(0), "cu_seq_lens_q": batch.cu_seqlens}


@functools.cache
def _has_recurrent_kernels() -> bool:
    from transformers.utils import import_utils

    return bool(
        import_utils.is_flash_linear_attention_available()
        or import_utils.is_causal_conv1d_available()
        or import_utils.is_mamba_ssm_available()
    )


def packed_logits(model: torch.nn.Module, batch: PackedBatch, **others: torch.Tensor) -> torch.Tensor:
    """Return the logits [L, vocabulary] of a pack at the target positions; `others`: arguments for recurrent layers."""
    # A mask of ones keeps transformers from searching the positions for packs.
    with packed_attention.use_pack(model, batch.lengths, batch.cu_seqlens):
        logits: torch.Tensor = model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=torch.ones_like(batch.tokens),
            use_cache=False,
            logits_to_keep=batch.target_positions,
            **others,
        ).logits.squeeze(0)  # backward of [0] would allocate zeros of the full shape
    return logits if len(logits) == len(batch.target_positions) else logits[batch.target_positions]


def _pack(examples: list[np.ndarray], targets: list[np.ndarray], device: torch.device) -> PackedBatch:
    lengths = [len(tokens) for tokens in examples]
    # The last position of an example predicts nothing.
    labels = np.concatenate([np.append(target, IGNORED) for target in targets])
    target_positions = np.flatnonzero(labels != IGNORED)
    has_targets = bool(len(target_positions))
    if not has_targets:
        target_positions, labels[0] = np.zeros(1, np.int64), 0
    return PackedBatch(
        tokens=_tensor(np.concatenate(examples), device).unsqueeze(0),
        positions=_tensor(np.concatenate([np.arange(n) for n in lengths]), device).unsqueeze(0),
        lengths=lengths,
        cu_seqlens=_tensor(np.cumsum([0, *lengths], dtype=np.int32), device),
        target_positions=_tensor(target_positions, device),
        labels=_tensor(labels[target_positions], device),
        has_targets=has_targets,
    )


def _pad(examples: list[np.ndarray], targets: list[np.ndarray], device: torch.device) -> PaddedBatch:
    width = max(len(tokens) for tokens in examples)
    tokens = np.zeros((len(examples), width), np.int64)
    mask = np.zeros((len(examples), width), np.int64)
    labels = np.full((len(examples), width), IGNORED)
    for row, (example, target) in enumerate(zip(examples, targets, strict=True)):
        tokens[row, : len(example)] = example
        mask[row, : len(example)] = 1
        labels[row, : len(target)] = target
    has_targets = bool((labels != IGNORED).any())
    if not has_targets:
        labels[0, 0] = 0
    rows, positions = np.nonzero(labels != IGNORED)
    columns, places = np.unique(positions, return_inverse=True)
    return PaddedBatch(
        tokens=_tensor(tokens, device),
        attention_mask=None if mask.all() else _tensor(mask, device),
        columns=_tensor(columns, device),
        rows=_tensor(rows, device),
        column_indices=_tensor(places.reshape(-1), device),
        labels=_tensor(labels[rows, positions], device),
        has_targets=has_targets,
    )


def _tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # copies of 64 KB or more from pageable memory are synchronous
    return tensor.to(device, non_blocking=True)
