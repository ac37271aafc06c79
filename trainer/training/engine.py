"""Model and DeepSpeed engine of a run: the same first weights in every ZeRO stage and on every rank."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.models import load, training_kernels
from trainer.runtime import distributed, process_group, startup
from trainer.settings import TrainSettings
from trainer.storage.run_directory import RunDirectory
from trainer.training import checkpoint, ds_config, gradient_norm


def build_engine(
    settings: TrainSettings,
    run: RunDirectory,
    config: Any,
    resolved: dict[str, Any],
    blank: bool = False,
) -> Any:
    """Weights as of the seed or the pretrained folder, the same in every ZeRO stage, in a DeepSpeed engine.

    `blank`: no weights at all, a checkpoint will be read into it.
    """
    import deepspeed

    # On a CPU DeepSpeed would compile a C++ extension in every new environment (40 s) for a collective of inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False)
    dtype = "bf16" if settings.bf16 else "fp32"
    if blank:
        with _into_shards(resolved):
            model = load.empty_model(config, dtype)
    else:
        with _weights(settings, config, run) as weights:
            with _into_shards(resolved):
                model = load.load_model(weights, dtype, config=config)
            distributed.barrier()  # a temporary folder is removed after everybody has read it
    training_kernels.patch_kernels(model, on_accelerator=torch.cuda.is_available())
    _gather_by_layer(model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with startup.torch_compile_disabled(), _without_broadcast() if blank else contextlib.nullcontext():
        engine, _, _, _ = deepspeed.initialize(
            model=model, model_parameters=_parameter_groups(model, settings.weight_decay), config=resolved
        )
    process_group.set_group_timeouts(settings.timeout_seconds)
    gradient_norm.patch_gradient_norm(engine.optimizer)
    engine.checkpoint_engine = checkpoint.SafeCheckpointEngine()
    engine.train()
    return engine


@contextlib.contextmanager
def _into_shards(resolved: dict[str, Any]) -> Iterator[None]:
    """Under ZeRO-3, inside this block, `from_pretrained` loads into shards: no rank ever holds the whole model.

    Transformers finds the configuration through a weak reference, hence the variable.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    held = HfDeepSpeedConfig(resolved) if ds_config.stage(resolved) == 3 else None
    try:
        yield
    finally:
        del held
        unset_hf_deepspeed_config()


def _gather_by_layer(model: torch.nn.Module) -> None:
    """Under ZeRO-3 a decoder layer's parameters are gathered, and let go, all at once instead of module by module.

    With DeepSpeed's hooks at every module of GPT-2 XL the processor is slower than an H200; and a layer is one collective
    instead of a dozen.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layer in load.decoder_layers(model):
        set_z3_leaf_module(layer, True)


@contextlib.contextmanager
def _without_broadcast() -> Iterator[None]:
    """Inside, an engine is made without sending rank 0's weights to all ranks: a checkpoint will be read into them."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    send = DeepSpeedEngine._broadcast_model
    DeepSpeedEngine._broadcast_model = lambda engine: None
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = send


@contextlib.contextmanager
def _weights(settings: TrainSettings, config: Any, run: RunDirectory) -> Iterator[str]:
    """Where every rank loads its first weights: the pretrained model, or a folder rank 0 fills from the seed.

    The folder must be written before transformers is told of ZeRO-3, which would save empty shards.
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
    """Matrices are decayed, vectors (biases, norms) are not. Without decay one group: fewer collectives."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not weight_decay:
        return parameters
    # Under ZeRO-3 a parameter is an empty shard here; DeepSpeed keeps its shape in ds_shape.
    is_matrix = [len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 for parameter in parameters]
    groups = {True: weight_decay, False: 0.0}
    return [
        {
            "params": [p for p, matrix in zip(parameters, is_matrix, strict=True) if matrix is which],
            "weight_decay": decay,
        }
        for which, decay in groups.items()
    ]
