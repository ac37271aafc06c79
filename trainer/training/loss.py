"""The loss of one forward pass over packed or padded rows.

The loss of a step is the sum of the token losses of all ranks, divided by the number of target tokens of all ranks. The
target tokens are counted before the forward passes. DeepSpeed averages gradients over ranks, so `loop.optimizer_step`
multiplies the loss by the world size. (The mean of per-rank means would be wrong if ranks have different numbers of
target tokens: the gradient was 122 % off in a measured case with two ranks.)
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.models import packed_attention
from trainer.training.batches import MicroBatch
from trainer.training.cross_entropy import summed_cross_entropy

IGNORED = -100  # label of a position without loss (torch's and transformers' convention)


@dataclass(frozen=True)
class PackedBatch:
    """One row of T tokens that concatenates whole examples. L: number of target tokens.

    tokens [1, T]. positions [1, T]: start at 0 in each example. lengths: number of tokens of each example. cu_seqlens
    [examples + 1] int32: cumulative lengths. target_positions [L]: indices of the tokens in the row that predict a target
    token. labels [L]: target tokens. has_targets: False if there is no target token; then L is 1 and the label is a dummy.
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
    """B rows of T tokens, with one padded example per row. L: number of target tokens.

    tokens [B, T]. attention_mask [B, T]: 1 for tokens, 0 for padding; None without padding. columns [C]: positions that
    predict a target token in at least one row. labels [L]: target tokens. Label i is predicted in row rows[i] at position
    columns[column_indices[i]]. has_targets: as in `PackedBatch`.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor | None
    columns: torch.Tensor
    rows: torch.Tensor
    column_indices: torch.Tensor
    labels: torch.Tensor
    has_targets: bool


def collate(batch: MicroBatch, packing: bool, device: torch.device) -> PackedBatch | PaddedBatch:
    """Return the examples as tensors on `device`. An empty batch becomes one example of two tokens without loss.

    A rank may have no examples in the last step, but it must take part in the collectives of forward and backward.
    """
    examples = batch.examples or [(np.zeros(2, np.int64), np.zeros(2, bool))]
    # Labels are shifted: a position predicts the next token, and an example's last position predicts nothing.
    labels = [np.append(np.where(mask[1:], tokens[1:], IGNORED), IGNORED) for tokens, mask in examples]
    return (_pack if packing else _pad)([tokens for tokens, _ in examples], labels, device)


def summed_token_loss(model: torch.nn.Module, batch: PackedBatch | PaddedBatch) -> torch.Tensor:
    """Return the sum of the losses of the target tokens in nats (fp32, differentiable)."""
    losses = summed_cross_entropy(target_logits(model, batch), batch.labels)
    return losses if batch.has_targets else losses * 0


def target_logits(model: torch.nn.Module, batch: PackedBatch | PaddedBatch) -> torch.Tensor:
    """Return the logits [L, vocabulary] that predict the target tokens, in the order of the examples.

    `model`: a causal LM of transformers, or the DeepSpeed engine that wraps this model.
    """
    if isinstance(batch, PackedBatch):
        return packed_logits(model, batch, **_boundaries(model, batch))
    module: Any = getattr(model, "module", model)
    accepted = _accepted_arguments(type(module))  # type: ignore[arg-type]
    arguments: dict[str, Any] = {"use_cache": False, "logits_to_keep": batch.columns}
    arguments = {name: value for name, value in arguments.items() if name in accepted or not accepted}
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask, **arguments).logits
    if logits.shape[1] != len(batch.columns):  # the model has no `logits_to_keep`, so it computed all logits
        logits = logits[:, batch.columns]
    return logits[batch.rows, batch.column_indices]  # type: ignore[no-any-return]


@functools.cache
def _accepted_arguments(model_class: type[Any]) -> frozenset[str]:
    """Return the argument names of a model's `forward`, or an empty set if `forward` takes **kwargs."""
    parameters = inspect.signature(model_class.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return frozenset() if takes_any else frozenset(parameters)


def _boundaries(model: torch.nn.Module, batch: PackedBatch) -> dict[str, torch.Tensor]:
    """Return the arguments with which kernels of recurrent and convolutional layers separate the examples of a pack.

    The packages causal_conv1d and mamba_ssm need `seq_idx` (int32 [1, T]: index of each token's example). The package
    flash-linear-attention needs `cu_seq_lens_q`. transformers' DataCollatorWithFlattening gives the same arguments. If none
    of the packages is installed, return {}, because transformers' torch versions of the layers raise an exception for both
    arguments. The tests do not run the kernels, but layout_check.py checks the logits before the first step.
    """
    # Every model whose kernels take these arguments has a Conv1d.
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
    """Return the logits [L, vocabulary] of a pack at the target positions. `others`: result of `_boundaries`."""
    # Pass a mask of ones: without a mask, transformers would derive example boundaries from the positions.
    with packed_attention.use_pack(model, batch.lengths, batch.cu_seqlens):
        logits: torch.Tensor = model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=torch.ones_like(batch.tokens),
            use_cache=False,
            logits_to_keep=batch.target_positions,
            **others,
        ).logits.squeeze(0)  # with `[0]`, the backward pass would allocate a tensor of zeros
    return logits if len(logits) == len(batch.target_positions) else logits[batch.target_positions]


def _pack(examples: list[np.ndarray], example_labels: list[np.ndarray], device: torch.device) -> PackedBatch:
    lengths = [len(tokens) for tokens in examples]
    labels = np.concatenate(example_labels)
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


def _pad(examples: list[np.ndarray], example_labels: list[np.ndarray], device: torch.device) -> PaddedBatch:
    shape = (len(examples), max(len(tokens) for tokens in examples))
    tokens, mask, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, IGNORED)
    for row, (example, row_labels) in enumerate(zip(examples, example_labels, strict=True)):
        length = len(example)
        tokens[row, :length], mask[row, :length], labels[row, :length] = example, 1, row_labels
    has_targets = bool((labels != IGNORED).any())
    if not has_targets:
        labels[0, 0] = 0
    rows, positions = np.nonzero(labels != IGNORED)
    columns, column_indices = np.unique(positions, return_inverse=True)
    return PaddedBatch(
        tokens=_tensor(tokens, device),
        attention_mask=None if mask.all() else _tensor(mask, device),
        columns=_tensor(columns, device),
        rows=_tensor(rows, device),
        column_indices=_tensor(column_indices.reshape(-1), device),
        labels=_tensor(labels[rows, positions], device),
        has_targets=has_targets,
    )


def _tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # copies of more than 64 KB from unpinned memory are synchronous

    return tensor.to(device, non_blocking=True)
