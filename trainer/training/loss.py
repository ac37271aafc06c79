"""The loss of a micro-batch, packed or padded: the same number either way.

The step's loss is the sum of the token losses over all ranks divided by the learned tokens of the whole optimizer
step, counted before the forward passes. Gradients are averaged over ranks by DeepSpeed, hence the factor of the
world size. (The mean over ranks of per-rank means is wrong when answers differ in length: 122 % gradient error on
a two-rank case.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from trainer.models import packed_attention
from trainer.training.batches import MicroBatch
from trainer.training.cross_entropy import summed_cross_entropy

IGNORED = -100  # a label that carries no loss (torch's and transformers' convention)


@dataclass(frozen=True)
class Packed:
    """One row: tokens [1, T], positions [1, T] restarting per example, where examples start, what to predict.

    predicting [L]: positions whose next token is learned; labels [L]: those tokens. counts: False if nothing is learned;
    the one position there is then has no loss.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]
    bounds: torch.Tensor
    predicting: torch.Tensor
    labels: torch.Tensor
    counts: bool


@dataclass(frozen=True)
class Padded:
    """One row per example: tokens [B, T], attention mask [B, T], labels [B, T] shifted to the predicting position."""

    tokens: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def lay_out(batch: MicroBatch, packing: bool, device: torch.device) -> Packed | Padded:
    """Numpy examples -> tensors on the device. An empty batch becomes two tokens without loss.

    (A rank without data in the last step still takes part in every collective of the forward and backward pass.)
    """
    examples = batch.examples or [(np.zeros(2, np.int64), np.zeros(2, bool))]
    targets = [np.where(learned[1:], tokens[1:], IGNORED) for tokens, learned in examples]
    if packing:
        return _pack([tokens for tokens, _ in examples], targets, device)
    return _pad([tokens for tokens, _ in examples], targets, device)


def token_losses(model: torch.nn.Module, batch: Packed | Padded) -> torch.Tensor:
    """Forward pass; the sum of the losses of the learned tokens, in nats, fp32, with its graph."""
    if isinstance(batch, Packed):
        losses = summed_cross_entropy(packed_logits(model, batch), batch.labels)
        return losses if batch.counts else losses * 0
    logits = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
    return cross_entropy(
        logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def packed_logits(model: torch.nn.Module, batch: Packed, **others: torch.Tensor) -> torch.Tensor:
    """Forward pass of a pack, the head at the predicting positions only: logits [L, vocabulary].

    others: what recurrent layers need besides (sequence boundaries for their kernels).
    """
    # All examples are whole, so the mask hides nothing; with one, transformers does not search positions for packs.
    with packed_attention.use_pack(model, batch.lengths, batch.bounds):
        logits: torch.Tensor = model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=torch.ones_like(batch.tokens),
            use_cache=False,
            logits_to_keep=batch.predicting,
            **others,
        ).logits.squeeze(0)  # not [0], whose gradient is a whole tensor of zeros to copy into
    return logits if len(logits) == len(batch.predicting) else logits[batch.predicting]


def _pack(examples: list[np.ndarray], targets: list[np.ndarray], device: torch.device) -> Packed:
    lengths = [len(tokens) for tokens in examples]
    # The last position of an example predicts nothing.
    labels = np.concatenate([np.append(target, IGNORED) for target in targets])
    predicting = np.flatnonzero(labels != IGNORED)
    counts = bool(len(predicting))
    if not counts:
        predicting, labels[0] = np.zeros(1, np.int64), 0
    return Packed(
        tokens=_tensor(np.concatenate(examples), device).unsqueeze(0),
        positions=_tensor(np.concatenate([np.arange(n) for n in lengths]), device).unsqueeze(0),
        lengths=lengths,
        bounds=_tensor(np.cumsum([0, *lengths], dtype=np.int32), device),
        predicting=_tensor(predicting, device),
        labels=_tensor(labels[predicting], device),
        counts=counts,
    )


def _pad(examples: list[np.ndarray], targets: list[np.ndarray], device: torch.device) -> Padded:
    width = max(len(tokens) for tokens in examples)
    tokens = np.zeros((len(examples), width), np.int64)
    mask = np.zeros((len(examples), width), np.int64)
    labels = np.full((len(examples), width), IGNORED)
    for row, (example, target) in enumerate(zip(examples, targets, strict=True)):
        tokens[row, : len(example)] = example
        mask[row, : len(example)] = 1
        labels[row, : len(target)] = target
    return Padded(_tensor(tokens, device), _tensor(mask, device), _tensor(labels, device))


def _tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy of 64 KB or more from pageable memory waits for the device
    return tensor.to(device, non_blocking=True)
