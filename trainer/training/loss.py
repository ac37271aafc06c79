"""The loss of one forward pass, packed or padded: the same number either way.

The step's loss is the sum of the token losses over all ranks divided by the learned tokens of the whole optimizer
step, counted before the forward passes. Gradients are averaged over ranks by DeepSpeed, hence the factor of the
world size. (The mean over ranks of per-rank means is wrong when answers differ in length: 122 % gradient error on
a two-rank case.)
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
    """One row: tokens [1, T], positions [1, T] restarting per example, where examples start, what to predict.

    predicting [L]: positions whose next token is learned; labels [L]: those tokens. counts: False if nothing is learned;
    the one position there is then has no loss.
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
    """One row per example: tokens [B, T], attention mask [B, T] (None if all rows are full), what to predict.

    columns [C]: positions at which any row predicts a learned token; rows [L], places [L]: row and index into `columns`
    of each learned token; labels [L]: those tokens. counts: as in `Packed`.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor | None
    columns: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    labels: torch.Tensor
    has_targets: bool


def collate(batch: MicroBatch, packing: bool, device: torch.device) -> PackedBatch | PaddedBatch:
    """Numpy examples -> tensors on the device. An empty batch becomes two tokens without loss.

    (A rank without data in the last step still takes part in every collective of the forward and backward pass.)
    """
    examples = batch.examples or [(np.zeros(2, np.int64), np.zeros(2, bool))]
    targets = [np.where(learned[1:], tokens[1:], IGNORED) for tokens, learned in examples]
    if packing:
        return _pack([tokens for tokens, _ in examples], targets, device)
    return _pad([tokens for tokens, _ in examples], targets, device)


def summed_token_loss(model: torch.nn.Module, batch: PackedBatch | PaddedBatch) -> torch.Tensor:
    """Forward pass; the sum of the losses of the learned tokens, in nats, fp32, with its graph."""
    losses = summed_cross_entropy(target_logits(model, batch), batch.labels)
    return losses if batch.has_targets else losses * 0


def target_logits(model: torch.nn.Module, batch: PackedBatch | PaddedBatch) -> torch.Tensor:
    """Forward pass; return the logits that predict the learned tokens [L, vocabulary], in the order of the examples.

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
    return logits[batch.rows, batch.places]  # type: ignore[no-any-return]


@functools.cache
def _accepted_arguments(model_class: type[Any]) -> frozenset[str]:
    """Return the names of the arguments of a forward pass; empty if it takes any."""
    parameters = inspect.signature(model_class.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return frozenset() if takes_any else frozenset(parameters)


def _boundaries(model: torch.nn.Module, batch: PackedBatch) -> dict[str, torch.Tensor]:
    """Return what the kernels of recurrent and convolutional layers need to keep the examples of a pack apart.

    `seq_idx` (int32 [1, T]: the example of each token) for causal_conv1d and mamba_ssm, `cu_seq_lens_q` for
    flash-linear-attention, as transformers' DataCollatorWithFlattening gives them. Only where the kernels are installed:
    transformers' torch versions of these layers raise an exception for either. No machine of ours has had the kernels,
    so this was never run; the check before the first step (layout_check.py) decides whether it works.
    """
    if not _has_recurrent_kernels() or not _has_convolutions(getattr(model, "module", model)):
        return {}
    lengths = torch.tensor(batch.lengths, device=batch.tokens.device)
    examples = torch.arange(len(batch.lengths), dtype=torch.int32, device=batch.tokens.device)
    return {"seq_idx": examples.repeat_interleave(lengths).unsqueeze(0), "cu_seq_lens_q": batch.cu_seqlens}


@functools.cache
def _has_recurrent_kernels() -> bool:
    from transformers.utils import import_utils

    return any(
        check()
        for check in (
            import_utils.is_flash_linear_attention_available,
            import_utils.is_causal_conv1d_available,
            import_utils.is_mamba_ssm_available,
        )
    )


def _has_convolutions(model: torch.nn.Module) -> bool:
    """Return whether a model has layers with a short convolution, as all hybrids whose kernels take boundaries have."""
    return any(isinstance(module, torch.nn.Conv1d) for module in model.modules())


def packed_logits(model: torch.nn.Module, batch: PackedBatch, **others: torch.Tensor) -> torch.Tensor:
    """Forward pass of a pack, the head at the predicting positions only: logits [L, vocabulary].

    others: what recurrent layers need besides (sequence boundaries for their kernels).
    """
    # All examples are whole, so the mask hides nothing; with one, transformers does not search positions for packs.
    with packed_attention.use_pack(model, batch.lengths, batch.cu_seqlens):
        logits: torch.Tensor = model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=torch.ones_like(batch.tokens),
            use_cache=False,
            logits_to_keep=batch.target_positions,
            **others,
        ).logits.squeeze(0)  # not [0], whose gradient is a whole tensor of zeros to copy into
    return logits if len(logits) == len(batch.target_positions) else logits[batch.target_positions]


def _pack(examples: list[np.ndarray], targets: list[np.ndarray], device: torch.device) -> PackedBatch:
    lengths = [len(tokens) for tokens in examples]
    # The last position of an example predicts nothing.
    labels = np.concatenate([np.append(target, IGNORED) for target in targets])
    predicting = np.flatnonzero(labels != IGNORED)
    counts = bool(len(predicting))
    if not counts:
        predicting, labels[0] = np.zeros(1, np.int64), 0
    return PackedBatch(
        tokens=_tensor(np.concatenate(examples), device).unsqueeze(0),
        positions=_tensor(np.concatenate([np.arange(n) for n in lengths]), device).unsqueeze(0),
        lengths=lengths,
        cu_seqlens=_tensor(np.cumsum([0, *lengths], dtype=np.int32), device),
        target_positions=_tensor(predicting, device),
        labels=_tensor(labels[predicting], device),
        has_targets=counts,
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
    counts = bool((labels != IGNORED).any())
    if not counts:
        labels[0, 0] = 0
    rows, positions = np.nonzero(labels != IGNORED)
    columns, places = np.unique(positions, return_inverse=True)
    return PaddedBatch(
        tokens=_tensor(tokens, device),
        attention_mask=None if mask.all() else _tensor(mask, device),
        columns=_tensor(columns, device),
        rows=_tensor(rows, device),
        places=_tensor(places.reshape(-1), device),
        labels=_tensor(labels[rows, positions], device),
        has_targets=counts,
    )


def _tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy of 64 KB or more from pageable memory waits for the device
    return tensor.to(device, non_blocking=True)
