"""Memory of activations, traced by running the real forward and backward pass on tensors without data.

Model and loss of training run under torch's FakeTensorMode: shapes and dtypes are real, storage is not. Counting the
live bytes needs no formula per architecture, and no special case for checkpointing, tied heads or logits at target
positions.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.errors import UserError, first_line
from trainer.models import default_attention, load, packed_attention, training_kernels
from trainer.models.architecture import quiet_transformers
from trainer.models.default_attention import set_attention
from trainer.runtime import library_internals
from trainer.training.loss import PackedBatch, PaddedBatch, summed_token_loss

_CUDA_ATTENTION = "planned"


@dataclass(frozen=True)
class MemorySample:
    """Activation memory between the completion of two parameters' gradients.

    gradient_elements: elements of the gradients completed so far. bytes: peak of live activations in the interval.
    bytes_at_start: live activations at its start.
    """

    gradient_elements: int
    bytes: int
    bytes_at_start: int


@dataclass(frozen=True)
class ActivationTrace:
    """Activation memory of one forward and backward pass, without weights and parameters' gradients."""

    samples: tuple[MemorySample, ...]
    saved_bytes: int  # alive between forward and backward

    @property
    def peak_bytes(self) -> int:
        return max(sample.bytes for sample in self.samples)


def trace_activations(
    config: Any, lengths: list[int], learned_tokens: int, dtype: torch.dtype, checkpointing: bool, cuda: bool
) -> ActivationTrace:
    """Trace one micro-batch: examples of `lengths` tokens in one packed row, of which `learned_tokens` are targets.

    `cuda`: attention over a pack is one kernel that keeps query, key, value, output and one fp32 number per head and
    token (flash attention), an RMS norm is one kernel, and dropout keeps one byte per element; otherwise torch's CPU
    kernels are counted. Families that cannot be packed are traced in padded rows. Raises UserError for a model that
    does not run on shapes alone.
    """
    reason = ""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        warnings.catch_warnings(),
        quiet_transformers(),
        library_internals.without_grouped_products(),
    ):
        warnings.simplefilter("ignore")
        for packed in (True, False):  # as in training: packed where the family allows it, else padded
            try:
                model = _model(config, packed, dtype, checkpointing, cuda)
                make_batch = batch_of if packed else padded_batch_of
                return _trace(model, make_batch(lengths, learned_tokens), cuda)
            except Exception as error:  # models raise errors of many types for an unknown attention
                reason = first_line(error)
    raise UserError(
        f"the memory of a {config.model_type} model cannot be planned, because its forward pass does not run on shapes alone "
        f"({reason}): train it for a step and read memory_bytes in metrics.jsonl"
    )


def _trace(model: torch.nn.Module, batch: PackedBatch | PaddedBatch, cuda: bool) -> ActivationTrace:
    counter = _LiveBytes([*model.parameters(), *model.buffers(), *vars(batch).values()])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(counter.gradient_done)
    with counter, _dropout(cuda):
        loss = summed_token_loss(model, batch)
        saved = counter.live
        loss.backward()
    return ActivationTrace((*counter.samples, counter.sample()), saved)


def _model(config: Any, packed: bool, dtype: torch.dtype, checkpointing: bool, cuda: bool) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    # A copy: a model shares its config, and the attention set below would stay in it.
    attention = load.default_attn_implementation(config)
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation=attention, dtype=dtype
    )
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


def batch_of(lengths: list[int], learned_tokens: int) -> PackedBatch:
    tokens = sum(lengths)
    return PackedBatch(
        tokens=torch.zeros(1, tokens, dtype=torch.int64),
        positions=torch.zeros(1, tokens, dtype=torch.int64),
        lengths=lengths,
        cu_seqlens=torch.zeros(len(lengths) + 1, dtype=torch.int32),
        target_positions=torch.zeros(learned_tokens, dtype=torch.int64),
        labels=torch.zeros(learned_tokens, dtype=torch.int64),
        has_targets=True,
    )


def padded_batch_of(lengths: list[int], learned_tokens: int) -> PaddedBatch:
    """Return one row per example; the targets are at the ends of the rows."""
    rows, longest = len(lengths), max(lengths)
    columns = min(longest, -(-learned_tokens // rows))
    mask = torch.zeros(rows, longest, dtype=torch.int64)
    places = torch.arange(learned_tokens)
    return PaddedBatch(
        tokens=torch.zeros(rows, longest, dtype=torch.int64),
        attention_mask=mask if len(set(lengths)) > 1 else None,
        columns=torch.arange(longest - columns, longest),
        rows=(places // columns).clamp(max=rows - 1),
        column_indices=places % columns,
        labels=torch.zeros(learned_tokens, dtype=torch.int64),
        has_targets=True,
    )


class _LiveBytes(TorchDispatchMode):
    """Dispatch mode that counts the bytes of live storages made by operators; views share their storage.

    `given`: tensors that are not counted.
    """

    def __init__(self, given: list[Any]) -> None:
        super().__init__()
        self.live = 0
        self._peak = self._at_start = 0
        self._gradient_elements = 0
        self.samples: list[MemorySample] = []
        storages = [value.untyped_storage() for value in given if isinstance(value, torch.Tensor)]
        self._known = weakref.WeakSet(storages)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        self._peak = max(self._peak, self.live)
        return out

    def gradient_done(self, parameter: torch.Tensor) -> None:
        """End an interval: a complete gradient is no activation any more (zero_memory.py counts it)."""
        self.samples.append(self.sample())
        self._gradient_elements += parameter.numel()
        parameter.grad = None
        self._peak = self._at_start = self.live

    def sample(self) -> MemorySample:
        """Return the interval since the last complete gradient."""
        return MemorySample(self._gradient_elements, self._peak, self._at_start)

    def _count(self, storage: Any) -> None:
        if storage not in self._known:
            size = storage.nbytes()
            self._known.add(storage)
            self.live += size
            weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.live -= size


@contextlib.contextmanager
def _dropout(cuda: bool) -> Iterator[None]:
    """Context manager that traces a GPU's dropout, which keeps one byte per element; a CPU's keeps noise of the dtype.

    The function is patched, because a TorchFunctionMode is not active when checkpointing recomputes in backward.
    """
    functions: Any = torch.nn.functional
    before = functions.dropout

    def fused(
        input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p else input

    functions.dropout = fused if cuda else before
    try:
        yield
    finally:
        functions.dropout = before


class _FlashAttention(torch.autograd.Function):
    """Placeholder for fused attention over all examples of a pack: allocates and saves what the kernel does.

    It computes no values.
    """

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
    """Placeholder for a fused RMS norm: saves for backward what the kernel saves (input, one fp32 number per token).

    It computes no values.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any) -> Any:
        statistics = torch.empty(hidden.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, statistics)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        hidden, weight, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight)
