"""Memory of activations, traced by running the forward and backward pass on tensors without data.

A training step is executed under torch's FakeTensorMode, where tensors have shapes and dtypes but no data. The bytes of
live tensors are counted. So no architecture needs a formula, and checkpointing, tied heads and logits at target
positions are not special cases.
"""

import contextlib
import copy
import functools
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.errors import UserError, first_line
from trainer.models import default_attention, load, packed_attention, training_kernels
from trainer.models.architecture import quiet_transformers
from trainer.models.default_attention import set_attention
from trainer.runtime import library_internals
from trainer.training import cross_entropy
from trainer.training.loss import PackedBatch, PaddedBatch, summed_token_loss

_CUDA_ATTENTION = "planned"


@dataclass(frozen=True)
class MemorySample:
    """Activation memory in one interval of a training step. An interval ends when a parameter's gradient is complete."""

    gradient_elements: int  # number of elements of the gradients completed before the interval
    bytes: int  # peak size of live activations in the interval
    bytes_at_start: int  # size of live activations at the start of the interval


@dataclass(frozen=True)
class ActivationTrace:
    """Activation memory of one forward and backward pass, without the weights and their gradients."""

    samples: tuple[MemorySample, ...]
    logits_bytes: int = 0  # bytes of logits in `samples[0]`; 0 if the logits were not measured separately

    @property
    def peak_bytes(self) -> int:
        return max(sample.bytes for sample in self.samples)


def trace_activations(
    config: Any, lengths: list[int], num_targets: int, dtype: torch.dtype, checkpointing: bool, cuda: bool
) -> ActivationTrace:
    """Return the trace of one micro-batch: one pack of examples of `lengths` tokens, with `num_targets` target tokens.

    Models that cannot be packed are traced with one padded row per example. If `cuda`, count the tensors of GPU kernels, else
    those of CPU kernels. On a GPU, flash attention keeps query, key, value, output and one fp32 number per head and token
    for the backward pass; dropout keeps one byte per element; the RMS norm is fused; the blocks of the loss are large.
    Raises UserError if the model's forward pass reads the values of tensors.
    """
    reason = ""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        warnings.catch_warnings(),
        quiet_transformers(),
        library_internals.without_grouped_products(),
    ):
        warnings.simplefilter("ignore")
        for packed in (True, False):  # as in training: packed if the model can be packed, else padded
            try:
                model = _make_model(config, packed, dtype, checkpointing, cuda)
                make_batch = make_packed_batch if packed else make_padded_batch
                return _trace(model, make_batch(lengths, num_targets), cuda)
            except Exception as error:  # models that cannot be traced raise various types
                reason = first_line(error)
    raise UserError(
        f"the memory of a {config.model_type} model cannot be planned, because its forward pass does not run on shapes alone "
        f"({reason}): train it for a step and read memory_bytes in metrics.jsonl"
    )


def _trace(model: torch.nn.Module, batch: PackedBatch | PaddedBatch, cuda: bool) -> ActivationTrace:
    counter = _LiveBytes([*model.parameters(), *model.buffers(), *vars(batch).values()])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(counter.end_interval)
    with counter, _gpu_kernels() if cuda else contextlib.nullcontext():
        summed_token_loss(model, batch).backward()
    return ActivationTrace((*counter.samples, counter.sample()))


def _make_model(
    config: Any, packed: bool, dtype: torch.dtype, checkpointing: bool, cuda: bool
) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)  # because `set_attention` changes the model's config
    attention = load.default_attn_implementation(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    if packed and cuda:
        default_attention.register(_CUDA_ATTENTION, _attend, lambda pattern: default_attention.LayerMask())
        set_attention(model, _CUDA_ATTENTION)
    elif packed:
        set_attention(model, packed_attention.register())
    model.config.use_cache = False
    training_kernels.patch_kernels(model, on_accelerator=cuda)
    for norm in training_kernels.rms_norms(model) if cuda else []:
        norm.forward = functools.partial(lambda norm, hidden: _FusedNorm.apply(hidden, norm.weight), norm)
    if checkpointing and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def make_packed_batch(lengths: list[int], num_targets: int) -> PackedBatch:
    tokens = sum(lengths)
    return PackedBatch(
        tokens=torch.zeros(1, tokens, dtype=torch.int64),
        positions=torch.zeros(1, tokens, dtype=torch.int64),
        lengths=lengths,
        cu_seqlens=torch.zeros(len(lengths) + 1, dtype=torch.int32),
        target_positions=torch.zeros(num_targets, dtype=torch.int64),
        labels=torch.zeros(num_targets, dtype=torch.int64),
        has_targets=True,
    )


def make_padded_batch(lengths: list[int], num_targets: int) -> PaddedBatch:
    """Return a batch with one row per example. The targets are at the ends of the rows."""
    rows, longest = len(lengths), max(lengths)
    columns = min(longest, -(-num_targets // rows))
    mask = torch.zeros(rows, longest, dtype=torch.int64)
    indices = torch.arange(num_targets)
    return PaddedBatch(
        tokens=torch.zeros(rows, longest, dtype=torch.int64),
        attention_mask=mask if len(set(lengths)) > 1 else None,
        columns=torch.arange(longest - columns, longest),
        rows=(indices // columns).clamp(max=rows - 1),
        column_indices=indices % columns,
        labels=torch.zeros(num_targets, dtype=torch.int64),
        has_targets=True,
    )


class _LiveBytes(TorchDispatchMode):
    """Dispatch mode that counts the bytes of live storages. Storages of the tensors in `excluded` are not counted."""

    def __init__(self, excluded: list[Any]) -> None:
        super().__init__()
        self._live = self._peak = self._at_start = 0
        self._gradient_elements = 0
        self.samples: list[MemorySample] = []
        storages = [value.untyped_storage() for value in excluded if isinstance(value, torch.Tensor)]
        self._known = weakref.WeakSet(storages)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._live += storage.nbytes()
                weakref.finalize(storage, self._subtract, storage.nbytes())
        self._peak = max(self._peak, self._live)
        return out

    def end_interval(self, parameter: torch.Tensor) -> None:
        """Add a sample when a parameter's gradient is complete. Free the gradient, because zero_memory.py counts it."""
        self.samples.append(self.sample())
        self._gradient_elements += parameter.numel()
        parameter.grad = None
        self._peak = self._at_start = self._live

    def sample(self) -> MemorySample:
        """Return the memory sample of the current interval."""
        return MemorySample(self._gradient_elements, self._peak, self._at_start)

    def _subtract(self, size: int) -> None:
        self._live -= size


@contextlib.contextmanager
def _gpu_kernels() -> Iterator[None]:
    """Context manager that imitates GPU kernels: dropout keeps one byte per element, and the loss has large blocks."""

    def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return torch.native_dropout(input, p, True)[0] if training and p else input

    # These are patches, because a TorchFunctionMode is not active when checkpointing recomputes activations.
    with (
        mock.patch.object(torch.nn.functional, "dropout", dropout),
        mock.patch.object(cross_entropy, "block_bytes", lambda _: cross_entropy.ACCELERATOR_BLOCK_BYTES),
    ):
        yield


class _FlashAttention(torch.autograd.Function):
    """Placeholder for fused attention over a pack: allocates the kernel's tensors, but computes no values."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        statistics = torch.empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, statistics)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    return _FlashAttention.apply(query, key, value).transpose(1, 2), None


class _FusedNorm(torch.autograd.Function):
    """Placeholder for a fused RMS norm: keeps input, weight and one fp32 number per token, but computes no values."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any) -> Any:
        statistics = torch.empty(hidden.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, statistics)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        hidden, weight, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight)
