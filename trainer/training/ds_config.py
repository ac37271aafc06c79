"""Resolution of a ds_config file and the settings into the configuration that DeepSpeed runs with, without "auto".

"auto" belongs to Hugging Face's Trainer. DeepSpeed's own sections drop it and use a default, so that
`"bf16": {"enabled": "auto"}` means off. Here every "auto" is replaced by the value of the settings, and a value that
contradicts the settings raises UserError.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.settings import TrainSettings
from trainer.storage.configuration import did_you_mean

TOP_LEVEL_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "bf16",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "data_types",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "aio",
)
REFUSED_KEYS = {
    "fp16": "fp16 is not supported; use --bf16",
    "amp": "amp is not supported; use --bf16",
    "scheduler": "the learning rate follows --lr_scheduler_type, --warmup_steps and --learning_rate",
    "activation_checkpointing": "use --gradient_checkpointing",
    "wandb": "use --report_to wandb",
    "tensorboard": "metrics are in metrics.jsonl",
    "csv_monitor": "metrics are in metrics.jsonl",
}
OPTIMIZER_KEYS = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "torch_adam",
    "fused",
    "foreach",
    "adam_w_mode",
    "bias_correction",
)
DEFAULT = {"zero_optimization": {"stage": 1}}


def resolve_ds_config(settings: TrainSettings, world_size: int) -> dict[str, Any]:
    """Return the complete DeepSpeed configuration of a run.

    Raises UserError, naming file, key, both values and the remedy, on a contradiction or an unsupported key.
    """
    name = settings.deepspeed or "the default ds_config"
    config = _read(Path(settings.deepspeed)) if settings.deepspeed else json.loads(json.dumps(DEFAULT))
    _check_keys(config, TOP_LEVEL_KEYS, name)
    micro, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    required = {
        "train_batch_size": micro * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": settings.max_grad_norm,
    }
    for key, value in required.items():
        _set_or_check(config, key, value, name)
    _set_or_check(config.setdefault("bf16", {}), "enabled", settings.bf16, f"{name}: bf16")
    _resolve_optimizer(config, settings, name)
    _check_zero(config.setdefault("zero_optimization", {}), name)
    if settings.bf16 and stage(config) == 0:
        # Measured, one rank and two: after the first step the loss is 0.8 % off that of stages 1, 2 and 3, which agree.
        raise UserError(
            f"{name}: DeepSpeed 0.19.8 updates the weights wrongly in bf16 at ZeRO stage 0; use ds_configs/zero1.json, "
            "which trains the same model on one rank or many"
        )
    config.setdefault("steps_per_print", 1 << 30)  # metrics.jsonl has every step; DeepSpeed need not print
    config["checkpoint"] = {"tag_validation": "Ignore"}  # checkpoint.save broadcasts the tag
    _check_no_auto(config, name)
    return config


def stage(config: dict[str, Any]) -> int:
    return int(config["zero_optimization"].get("stage", 0))


def offloads(config: dict[str, Any]) -> bool:
    """Return whether the optimizer states are offloaded."""
    return bool(config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none")


def _resolve_optimizer(config: dict[str, Any], settings: TrainSettings, name: str) -> None:
    """Fill in AdamW: torch's fused one, or with offload DeepSpeed's CPU Adam.

    DeepSpeed's FusedAdam compiles C++ at the first start, and is 10 times slower on a CPU than torch's.
    """
    optimizer = config.setdefault("optimizer", {"type": "AdamW", "params": {}})
    if optimizer.get("type") != "AdamW":
        raise UserError(f"{name}: optimizer.type is {optimizer.get('type')!r}; only AdamW is supported")
    parameters, where = optimizer.setdefault("params", {}), f"{name}: optimizer.params"
    _check_keys(parameters, OPTIMIZER_KEYS, where)
    _set_or_check(parameters, "lr", settings.learning_rate, where)
    _set_or_check(parameters, "betas", [settings.adam_beta1, settings.adam_beta2], where)
    _set_or_check(parameters, "eps", settings.adam_epsilon, where)
    _set_or_check(parameters, "weight_decay", settings.weight_decay, where)
    if not offloads({"zero_optimization": config.get("zero_optimization", {})}):
        parameters.setdefault("torch_adam", True)
        if parameters["torch_adam"]:
            parameters.setdefault("fused", True)


def _check_zero(zero: dict[str, Any], name: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {key for field, info in fields.items() for key in (field, info.alias) if key}
    _check_keys(zero, tuple(sorted(known)), f"{name}: zero_optimization")
    if zero.setdefault("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"{name}: zero_optimization.stage is {zero['stage']!r}; choose 0, 1, 2 or 3")
    if not zero.get("compute_grad_norm", True):
        raise UserError(
            f"{name}: compute_grad_norm is false, but NaN gradients are detected by their norm; remove it"
        )
    for key in ("offload_optimizer", "offload_param"):
        offload = zero.get(key) or {}
        if offload.get("device") == "nvme":
            raise UserError(f"{name}: {key} to NVMe cannot be checkpointed here; use the device 'cpu'")
        if offload.get("ratio", 1.0) != 1.0:
            # DeepSpeed 0.19.8, stage3.py: the optimizer of the parameters left on the accelerator is never saved.
            raise UserError(
                f"{name}: with {key}.ratio below 1 DeepSpeed does not save all moments; leave it at 1"
            )


def _set_or_check(section: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set `key` where the file has "auto" or nothing. Raises UserError if it has another value."""
    found = section.get(key, "auto")
    if found != "auto" and found != value:
        raise UserError(
            f'{where}: {key} is {found!r} but the settings say {value!r}; write "auto" in the ds_config'
        )
    section[key] = value


def _check_keys(section: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in section:
        if key in REFUSED_KEYS:
            raise UserError(f"{where}: {key!r} cannot be set here: {REFUSED_KEYS[key]}")
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}")


def _check_no_auto(value: Any, where: str) -> None:
    if value == "auto":
        raise UserError(f'{where} is "auto", but no setting determines it; write a value')
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_no_auto(inner, f"{where}: {key}")


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"ds_config {path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"ds_config {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"ds_config {path} is not a JSON object")
    return config
