"""Construction of the DeepSpeed engine, with the same initial weights in every ZeRO stage and on every rank."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.models import load, training_kernels
from trainer.runtime import distributed, library_internals, process_group, startup
from trainer.settings import TrainSettings
from trainer.storage.run_directory import RunDirectory
from trainer.training import checkpoint, ds_config, gradient_norm


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
    _set_leaf_modules(model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with (
        startup.torch_compile_disabled(),
        library_internals.without_weight_broadcast() if empty else contextlib.nullcontext(),
    ):
        engine, _, _, _ = deepspeed.initialize(
            model=model, model_parameters=_parameter_groups(model, settings.weight_decay), config=resolved
        )
    process_group.set_group_timeouts(settings.timeout_seconds)
    gradient_norm.patch_gradient_norm(engine.optimizer)
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


def _set_leaf_modules(model: torch.nn.Module) -> None:
    """Make ZeRO-3 gather and release the parameters of a decoder layer together instead of module by module.

    A layer is then one collective instead of a dozen. With DeepSpeed's hooks at every module of GPT-2 XL the processor
    is slower than an H200.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layer in load.decoder_layers(model):
        set_z3_leaf_module(layer, True)


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
    is_matrix = [len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 for parameter in parameters]
    matrices = [p for p, matrix in zip(parameters, is_matrix, strict=True) if matrix]
    vectors = [p for p, matrix in zip(parameters, is_matrix, strict=True) if not matrix]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
