"""A plain copy of the model inside a DeepSpeed engine, on rank 0 in fp32, to compute the model's own numbers with.

Plain: built by transformers from the config, with its default attention and no kernel of ours. Memory that an fp32 engine
below ZeRO-3 holds anyway is shared.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch

from trainer.models import load
from trainer.runtime import distributed, malloc

_GATHERED_BYTES = 64 << 20  # of ZeRO-3 parameters in one collective
_SPARE = 0.8  # part of the free memory that the copy may take


def copy_model(engine: Any, config: Any, fresh: bool) -> Any:
    """Collective. Return the copy, on ranks other than 0 a bare True; None on every rank if memory does not allow it.

    `fresh`: the weights are random and no step was made. Then they are scaled (see `_enliven`).
    """
    parameters = list(engine.module.parameters())
    # RWKV divides its weights in place on entering evaluation mode.
    copy_all = fresh or hasattr(config, "rescale_every")
    fits = distributed.broadcast_object(_fits(parameters, copy_all))
    if not fits:
        return None
    main = distributed.is_main_process()
    model = _empty_model(config) if main else None
    made: dict[int, torch.nn.Parameter] = {}
    embeddings = _embeddings(engine.module)
    for parameter in _gathered(parameters):
        if main:
            values = parameter.detach()
            # The memory of a gathered parameter is about to be freed.
            copied = copy_all or hasattr(parameter, "ds_id")
            values = values.to(torch.float32 if values.is_floating_point() else values.dtype, copy=copied)
            if fresh:
                values = _set_nonzero(values, id(parameter) in embeddings)
            made[id(parameter)] = torch.nn.Parameter(values, requires_grad=False)
    if model is None:
        return True
    for name, parameter in engine.module.named_parameters(
        remove_duplicate=False
    ):  # tied ones by each of their names
        _set(model, name, made[id(parameter)])
    persistent = engine.module.state_dict(keep_vars=True).keys()
    buffers = dict(model.named_buffers())
    for name, buffer in engine.module.named_buffers():
        if name in persistent and name in buffers:
            buffers[name].copy_(buffer)
    return model.to(load.device()).eval()


def as_trained(model: torch.nn.Module, engine: Any) -> dict[str, torch.Tensor]:
    """Give the copy the dtypes of the engine's parameters; return its fp32 parameters by name, for `set_parameters`."""
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    dtypes = {name: parameter.dtype for name, parameter in engine.module.named_parameters()}
    set_parameters(model, {name: data.to(dtypes.get(name, data.dtype)) for name, data in before.items()})
    return before


def set_parameters(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = values[name]


def free(model: torch.nn.Module) -> None:
    """Give the copy's memory back at once, without a search for the reference cycles that still hold its modules."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    malloc.trim_heap()  # else it stays in the heap, in holes that later tensors need not fit into


def _empty_model(config: Any) -> Any:
    """Return the plain model with parameters that have no memory yet; its buffers are computed as always."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config),  # the engine's model keeps its own, which names its attention
            dtype=torch.float32,
            attn_implementation=load.default_attention(config),
            trust_remote_code=False,
        )


def _fits(parameters: list[torch.Tensor], copy_all: bool) -> bool:
    copied = [
        parameter
        for parameter in parameters
        if copy_all or hasattr(parameter, "ds_id") or parameter.dtype != torch.float32
    ]
    needed = 4 * sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in copied)
    return needed <= _SPARE * _free_bytes()


def _free_bytes() -> float:
    """Return the free memory of this rank's device."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    return malloc.available_bytes()


def _gathered(parameters: list[torch.nn.Parameter]) -> Iterator[torch.nn.Parameter]:
    """Collective under ZeRO-3. Each parameter, whole while it is yielded."""
    import deepspeed

    group: list[torch.nn.Parameter] = []
    size = 0
    for index, parameter in enumerate(parameters):
        group.append(parameter)
        size += int(getattr(parameter, "ds_numel", 0)) * parameter.element_size()
        if size < _GATHERED_BYTES and index + 1 < len(parameters):
            continue
        sharded = [member for member in group if hasattr(member, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            yield from group
        group, size = [], 0


def _embeddings(model: torch.nn.Module) -> set[int]:
    """Return the identities of the parameters of embeddings, tied heads included."""
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    return {id(parameter) for table in tables for parameter in table.parameters()}


def _set_nonzero(values: torch.Tensor, is_embedding: bool) -> torch.Tensor:
    """Return random first weights with which every path of a model shows in its logits.

    With those of a config (a spread of 0.02, gates and biases of zero) a model 64 wide has attention scores near zero: a
    soft cap or a mask that depends on them would change no logit now, and many later. Matrices are scaled up to unit gain, and
    parameters without variation get some.
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
    spread = float(torch.linalg.vector_norm(values)) / math.sqrt(values.numel())
    wanted = 1 / math.sqrt(max(values.shape[-2:]))
    return values * (wanted / spread) if spread < wanted else values


def _set(model: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    assert owner._parameters[attribute].shape == parameter.shape  # type: ignore[union-attr]
    owner._parameters[attribute] = parameter
