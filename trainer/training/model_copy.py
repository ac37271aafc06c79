"""Plain fp32 copy of the model inside a DeepSpeed engine, on rank 0, for `layout_check`.

Plain means: built by transformers from the config, with its default attention and without replaced kernels. The copy
shares the weights' memory with an fp32 engine below ZeRO-3.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch

from trainer.models import load
from trainer.runtime import distributed, library_internals, malloc

_MAX_GATHERED_BYTES = 64 << 20  # of ZeRO-3 parameters in one collective
_MAX_FREE_FRACTION = 0.8  # of the free memory that the copy may take


def copy_model(engine: Any, config: Any, is_untrained: bool) -> Any:
    """Collective. Return the copy on rank 0 and True on the others; None on all if rank 0 lacks the memory.

    `is_untrained`: the weights are random and no step was made. Then they are changed by `_amplify`.
    """
    parameters = list(engine.module.parameters())
    # RWKV divides its weights in place on entering evaluation mode.
    copy_all = is_untrained or hasattr(config, "rescale_every")
    if not distributed.broadcast_object(_fits(parameters, copy_all)):
        return None
    is_main = distributed.is_main_process()
    model = _empty_model(config) if is_main else None
    copies: dict[int, torch.nn.Parameter] = {}
    tables = [module for module in engine.module.modules() if isinstance(module, torch.nn.Embedding)]
    embeddings = {id(parameter) for table in tables for parameter in table.parameters()}  # tied heads too
    for parameter in _gathered(parameters):
        if is_main:
            values = parameter.detach()
            # ZeRO-3 frees the memory of a gathered parameter.
            must_copy = copy_all or hasattr(parameter, "ds_id")
            values = values.to(torch.float32 if values.is_floating_point() else values.dtype, copy=must_copy)
            if is_untrained:
                values = _amplify(values, id(parameter) in embeddings)
            copies[id(parameter)] = torch.nn.Parameter(values, requires_grad=False)
    if model is None:
        return True
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        path, _, attribute = name.rpartition(".")
        library_internals.replace_parameter(model.get_submodule(path), attribute, copies[id(parameter)])
    persistent = engine.module.state_dict(keep_vars=True).keys()
    buffers = dict(model.named_buffers())
    for name, buffer in engine.module.named_buffers():
        if name in persistent and name in buffers:
            buffers[name].copy_(buffer)
    return model.to(load.device()).eval()


@contextlib.contextmanager
def in_training_dtype(model: torch.nn.Module, engine: Any) -> Iterator[None]:
    """Context manager in which the copy has the dtypes of the engine."""
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    dtypes = {name: parameter.dtype for name, parameter in engine.module.named_parameters()}
    set_parameters(model, {name: data.to(dtypes.get(name, data.dtype)) for name, data in before.items()})
    try:
        yield
    finally:
        set_parameters(model, before)


def set_parameters(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = values[name]


def free(model: torch.nn.Module) -> None:
    """Free the copy's memory although reference cycles may still hold its modules."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    malloc.trim_heap()  # else it may stay in the heap as fragments


def _empty_model(config: Any) -> Any:
    """Return the plain model with parameters on meta and computed buffers."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config),  # `attn_implementation` is written into it
            dtype=torch.float32,
            attn_implementation=load.default_attn_implementation(config),
            trust_remote_code=False,
        )


def _fits(parameters: list[torch.Tensor], copy_all: bool) -> bool:
    copied = [
        parameter
        for parameter in parameters
        if copy_all or hasattr(parameter, "ds_id") or parameter.dtype != torch.float32
    ]
    needed = 4 * sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in copied)
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else malloc.available_bytes()
    return needed <= _MAX_FREE_FRACTION * free


def _gathered(parameters: list[torch.nn.Parameter]) -> Iterator[torch.nn.Parameter]:
    """Collective under ZeRO-3. Yield each parameter; its whole value is available until the next one."""
    import deepspeed

    group: list[torch.nn.Parameter] = []
    size = 0
    for index, parameter in enumerate(parameters):
        group.append(parameter)
        size += int(getattr(parameter, "ds_numel", 0)) * parameter.element_size()
        if size < _MAX_GATHERED_BYTES and index + 1 < len(parameters):
            continue
        sharded = [parameter for parameter in group if hasattr(parameter, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            yield from group
        group, size = [], 0


def _amplify(values: torch.Tensor, is_embedding: bool) -> torch.Tensor:
    """Return initial weights with which every part of a model affects its logits.

    With initial weights (standard deviation 0.02, gates and biases zero) a model of width 64 has attention scores near
    zero: a wrong soft cap or mask would change no logit now, but many after training. So matrices are scaled up to unit
    gain, and constant parameters get noise.
    """
    if not values.is_floating_point() or values.numel() < 2:
        return values
    random = torch.Generator(values.device).manual_seed(0)
    flat = values.flatten()
    if flat[0] == flat[-1] and bool((flat == flat[0]).all()):
        noise = torch.randn(values.shape, generator=random, device=values.device, dtype=values.dtype)
        return values + 0.1 * noise
    if values.dim() < 2 or is_embedding:
        return values
    root_mean_square = float(torch.linalg.vector_norm(values)) / math.sqrt(values.numel())
    unit_gain = 1 / math.sqrt(max(values.shape[-2:]))
    return values * (unit_gain / root_mean_square) if root_mean_square < unit_gain else values
