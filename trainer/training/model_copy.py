"""Plain fp32 copy of the model inside a DeepSpeed engine, on rank 0, for `layout_check`.

Plain means: transformers builds the model from the config, with the default attention and without replaced kernels. The
copy shares the memory of weights that are fp32 and not partitioned (ZeRO stages 0 to 2), with two exceptions. Untrained
weights are copied, because `_amplify` changes them. RWKV weights are copied, because evaluation mode rescales them.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch

from trainer.models import load
from trainer.runtime import distributed, library_internals, malloc

_MAX_GATHERED_BYTES = 64 << 20  # ZeRO-3 parameters are gathered in groups of about this size
_MAX_FREE_FRACTION = 0.8  # the copy may use at most this fraction of the free memory


def copy_model(engine: Any, config: Any, is_untrained: bool) -> Any:
    """Collective. Return the copy on rank 0 and True on other ranks, or None on all ranks if rank 0 lacks the memory.

    `is_untrained`: the weights are still random. In this case, `_amplify` changes the copied weights.
    """
    parameters = list(engine.module.parameters())
    # In evaluation mode, a model with `rescale_every` (RWKV) divides its weights in place: do not share them.
    copy_all = is_untrained or hasattr(config, "rescale_every")
    if not distributed.broadcast_object(_fits(parameters, copy_all)):
        return None
    is_main = distributed.is_main_process()
    copies: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    tables = [module for module in engine.module.modules() if isinstance(module, torch.nn.Embedding)]
    embeddings = {parameter for table in tables for parameter in table.parameters()}  # includes a tied head
    for parameter in _gathered(parameters):
        if is_main:
            values = parameter.detach()
            # ZeRO-3 frees a gathered parameter after this iteration.
            must_copy = copy_all or hasattr(parameter, "ds_id")
            values = values.to(torch.float32 if values.is_floating_point() else values.dtype, copy=must_copy)
            if is_untrained:
                values = _amplify(values, parameter in embeddings)
            copies[parameter] = torch.nn.Parameter(values, requires_grad=False)
    if not is_main:
        return True
    model = _empty_model(config)
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        path, _, attribute = name.rpartition(".")
        library_internals.replace_parameter(model.get_submodule(path), attribute, copies[parameter])
    persistent = engine.module.state_dict(keep_vars=True).keys()
    buffers = dict(model.named_buffers())
    for name, buffer in engine.module.named_buffers():
        if name in persistent and name in buffers:
            buffers[name].copy_(buffer)
    return model.to(load.local_device()).eval()


def in_training_dtype(model: torch.nn.Module, engine: Any) -> contextlib.AbstractContextManager[None]:
    """Return a context manager in which the parameters of the copy have the dtypes of the engine's parameters."""
    dtypes = {name: parameter.dtype for name, parameter in engine.module.named_parameters()}
    named = model.named_parameters()
    return load.data_in_dtypes([(parameter, dtypes.get(name, parameter.dtype)) for name, parameter in named])


def free(model: torch.nn.Module) -> None:
    """Free the memory of the model's tensors, even if reference cycles keep the modules alive."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    malloc.trim_heap()  # without this call, the freed memory may stay in the heap


def _empty_model(config: Any) -> Any:
    """Return a plain model. The parameters are on the meta device (without values), but the buffers have values."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config),  # `from_config` writes `attn_implementation` into the config
            dtype=torch.float32,
            attn_implementation=load.default_attn_implementation(config),
            trust_remote_code=False,
        )


def _fits(parameters: list[torch.Tensor], copy_all: bool) -> bool:
    num_elements = sum(
        int(getattr(parameter, "ds_numel", parameter.numel()))
        for parameter in parameters
        if copy_all or hasattr(parameter, "ds_id") or parameter.dtype != torch.float32
    )
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else malloc.available_bytes()
    return 4 * num_elements <= _MAX_FREE_FRACTION * free


def _gathered(parameters: list[torch.nn.Parameter]) -> Iterator[torch.nn.Parameter]:
    """Collective under ZeRO-3. Yield each parameter with its whole value, which is valid until the next iteration."""
    group: list[torch.nn.Parameter] = []
    num_bytes = 0
    for index, parameter in enumerate(parameters):
        group.append(parameter)
        num_bytes += int(getattr(parameter, "ds_numel", 0)) * parameter.element_size()
        if num_bytes >= _MAX_GATHERED_BYTES or index + 1 == len(parameters):
            sharded = [parameter for parameter in group if hasattr(parameter, "ds_id")]
            with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
                yield from group
            group, num_bytes = [], 0


def _amplify(values: torch.Tensor, is_embedding: bool) -> torch.Tensor:
    """Return an initial weight tensor, changed if necessary so that every part of the model affects the logits.

    With the usual initial weights (standard deviation 0.02, gates and biases zero), a model of width 64 has attention
    scores near zero. A wrong soft cap or mask would change logits only after training, so `layout_check` could not detect
    it. Therefore, matrices are scaled up to unit gain, and noise is added to tensors whose elements are all equal.
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
