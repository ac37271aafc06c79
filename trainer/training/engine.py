"""Construction of the DeepSpeed engine, with the same initial weights in every ZeRO stage and on every rank."""

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from trainer.models import load, training_kernels
from trainer.runtime import distributed, library_internals, startup
from trainer.settings import TrainSettings
from trainer.storage.run_directory import RunDirectory
from trainer.training import checkpoint, ds_config


def build_engine(
    settings: TrainSettings, run: RunDirectory, config: Any, resolved: dict[str, Any], empty: bool
) -> Any:
    """Return a DeepSpeed engine with the pretrained weights, or with random weights that depend on the seed only.

    `config`: configuration of the model. `resolved`: configuration of DeepSpeed. `empty`: leave the weights
    uninitialised, because a checkpoint will be loaded.
    """
    # Without this line, DeepSpeed on a CPU compiles a C++ extension (40 s) that only inference uses.
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
            distributed.barrier()  # rank 0 must not remove a temporary folder before all ranks have read the weights
    training_kernels.patch_kernels(model, on_accelerator=torch.cuda.is_available())
    # ZeRO-3 gathers the weights of a leaf module in one collective. A decoder layer that is not a leaf needs a dozen
    # collectives and runs hooks in each submodule. For GPT-2 XL, the CPU takes longer to launch these collectives and hooks
    # than an H200 takes to compute the step.
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
    """Context manager in which models are partitioned while they are built, at ZeRO stage 3. No effect at other stages."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # transformers keeps only a weak reference to this object, so the variable must keep the object alive
    hf_config = HfDeepSpeedConfig(resolved) if ds_config.zero_stage(resolved) == 3 else None
    try:
        yield
    finally:
        del hf_config
        unset_hf_deepspeed_config()


@contextlib.contextmanager
def _initial_weights(settings: TrainSettings, config: Any, run: RunDirectory) -> Iterator[str]:
    """Context manager that yields the pretrained model's name, or a folder in which rank 0 has saved random weights.

    Must be entered before `_zero3_init`: inside `_zero3_init`, transformers would save empty tensors.
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
    """Return two parameter groups for the optimizer: matrices with weight decay, and biases and norms without weight decay.

    If `weight_decay` is 0, return a plain list of all parameters. DeepSpeed makes a single group of this list, which needs
    fewer collectives than two groups.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not weight_decay:
        return parameters
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for parameter in parameters:
        # Under ZeRO-3, `shape` belongs to an empty placeholder; `ds_shape` is the shape of the whole parameter.
        groups[len(getattr(parameter, "ds_shape", parameter.shape)) >= 2].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def _patch_gradient_norm(optimizer: Any) -> None:
    """Make ZeRO stages 1 to 3 compute the gradient norm with `_gradient_norm`. No effect at stage 0 or with offload.

    DeepSpeed 0.19.8 reads the gradients up to five times. It searches each parameter's gradient for NaN and Inf, copies
    the gradient to fp64 and computes the norm. For the 580 parameters of GPT-2 XL, this takes thousands of kernel launches
    in each step. `_gradient_norm` reads each gradient once, and also accumulates in fp64. One call computes the norm of a
    whole parameter group (stage 3: sub-group). A search for NaN and Inf is not needed, because a NaN or Inf in the
    gradients makes the norm NaN or Inf.
    """
    offloaded = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    if offloaded or not hasattr(optimizer, "get_grad_norm_direct"):
        return
    optimizer.get_grad_norm_direct = functools.partial(_gradient_norm, optimizer.dp_process_group)
    # No search: `_gradient_norm` returns -1 for NaN and Inf, and `step` treats the norm -1 as an overflow.
    optimizer.check_overflow = lambda partition_gradients=True: None


@torch.no_grad()
def _gradient_norm(group: Any, gradients: Sequence[torch.Tensor], params: Sequence[Any]) -> torch.Tensor:
    """Return the L2 norm (fp32 scalar) of the gradients of all ranks in `group`, or -1 if an element is not finite.

    `gradients`: this rank's partition of each gradient, in any float dtype. The padding of a partition must be zero.
    """
    total = torch.stack(library_internals.tensor_norms(gradients, torch.float64)).square_().sum()

    dist.all_reduce(total, group=group)
    return torch.where(total.isfinite(), total.sqrt(), -1.0).float()
