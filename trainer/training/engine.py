"""Construction of the DeepSpeed engine, with the same initial weights in every ZeRO stage and on every rank."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.models import load, training_kernels
from trainer.runtime import distributed, library_internals, startup
from trainer.settings import TrainSettings
from trainer.storage.run_directory import RunDirectory
from trainer.training import checkpoint, ds_config


def build_engine(
    settings: TrainSettings,
    run: RunDirectory,
    config: Any,
    resolved: dict[str, Any],
    empty: bool = False,
) -> Any:
    """Return a DeepSpeed engine around the pretrained model, or around random weights that follow from the seed.

    `config`: the model's. `resolved`: DeepSpeed's configuration. `empty`: leave the weights uninitialised, because a
    checkpoint will be loaded.
    """
    import deepspeed

    # On a CPU DeepSpeed would compile a C++ extension (40 s) for a collective that only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False)
    dtype = "bf16" if settings.bf16 else "fp32"
    if empty:
        with _zero3_init(resolved):
            model = load.empty_model(config, dtype)
    else:
        with _initial_weights(settings, config, run) as weights:
            with _zero3_init(resolved):
                model = load.load_model(weights, dtype, config=config)
            distributed.barrier()  # rank 0 removes a temporary folder after all ranks have read it
    training_kernels.patch_kernels(model, on_accelerator=torch.cuda.is_available())
    # ZeRO-3 then gathers a decoder layer in one collective instead of a dozen. With DeepSpeed's hooks at every module of
    # GPT-2 XL the processor is slower than an H200.
    for layer in load.decoder_layers(model):
        deepspeed.utils.set_z3_leaf_module(layer, True)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with (
        startup.torch_compile_disabled(),
        library_internals.without_weight_broadcast() if empty else contextlib.nullcontext(),
    ):
        engine, _, _, _ = deepspeed.initialize(
            model=model, model_parameters=_parameter_groups(model, settings.weight_decay), config=resolved
        )
    library_internals.set_timeout_of_all_process_groups(settings.timeout_seconds)
    _patch_gradient_norm(engine.optimizer)
    engine.checkpoint_engine = checkpoint.SafeCheckpointEngine()
    engine.train()
    return engine


@contextlib.contextmanager
def _zero3_init(resolved: dict[str, Any]) -> Iterator[None]:
    """Context manager in which, under ZeRO-3, `from_pretrained` loads into shards: no rank holds the whole model."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # transformers keeps only a weak reference to it
    hf_config = HfDeepSpeedConfig(resolved) if ds_config.stage(resolved) == 3 else None
    try:
        yield
    finally:
        del hf_config
        unset_hf_deepspeed_config()


@contextlib.contextmanager
def _initial_weights(settings: TrainSettings, config: Any, run: RunDirectory) -> Iterator[str]:
    """Context manager that yields the pretrained model's name, or a folder with random weights written by rank 0.

    Must be entered before `_zero3_init`, under which transformers would save empty shards.
    """
    if settings.model_name_or_path:
        yield settings.model_name_or_path
        return
    folder = ""
    if distributed.is_main_process():
        run.path.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".initial-", suffix=".tmp", dir=run.path)
        load.write_random_weights(config, settings.seed, Path(folder))
    try:
        yield distributed.broadcast_object(folder)
    finally:
        if distributed.is_main_process():
            shutil.rmtree(folder, ignore_errors=True)


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[Any]:
    """Return the optimizer's groups: matrices with weight decay, vectors (biases, norms) without.

    Without decay there is one group, which needs fewer collectives.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not weight_decay:
        return parameters
    # Under ZeRO-3 a parameter is an empty shard here; DeepSpeed keeps its shape in ds_shape.
    matrices = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _patch_gradient_norm(optimizer: Any) -> None:
    """Replace the norm of a ZeRO optimizer of stage 1, 2 or 3, unless its gradients are offloaded to the host.

    DeepSpeed 0.19.8 reads the gradients up to five times: it searches NaN and Inf parameter by parameter (largest and
    smallest element), then copies each gradient to fp64 and takes its norm. For GPT-2 XL, with 580 parameters, that is
    thousands of kernel launches a step. Here the gradients are read once: all norms of a group come from one call,
    accumulated in fp64 as before, and a gradient that is not finite shows in the norm.
    """
    offloaded = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    if offloaded or not hasattr(optimizer, "get_grad_norm_direct"):
        return
    optimizer.get_grad_norm_direct = functools.partial(_gradient_norm, optimizer.dp_process_group)
    # `step` treats a norm of -1 as an overflow.
    optimizer.check_overflow = lambda partition_gradients=True: None


@torch.no_grad()
def _gradient_norm(group: Any, gradients: Sequence[torch.Tensor], params: Sequence[Any]) -> torch.Tensor:
    """Return the L2 norm (fp32 scalar) over all ranks of `group`; `gradients`: this rank's share, any float dtype.

    -1 if an element is not finite, as in DeepSpeed. Padding at the end of a partition is zeros and adds nothing.
    """
    norms = library_internals.tensor_norms(gradients, torch.float64)
    total = torch.stack(norms).square_().sum()
    dist.all_reduce(total, group=group)
    return torch.where(total.isfinite(), total.sqrt(), -1.0).float()
