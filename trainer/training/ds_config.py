"""Combine a ds_config file and the settings into a DeepSpeed configuration without "auto".

DeepSpeed ignores "auto" in a section and uses the key's default: `"bf16": {"enabled": "auto"}` turns bf16 off. Hugging
Face's Trainer replaces "auto", but this package does not use the Trainer. So this module replaces each "auto" by the value
of the corresponding setting. It raises UserError if there is no such setting, or if a value contradicts its setting.
"""

import json
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.settings import TrainSettings
from trainer.storage.configuration import did_you_mean

TOP_LEVEL_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "bf16", "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "communication_data_type", "data_types", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "comms_logger", "flops_profiler", "aio",
)  # fmt: skip
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
    "lr", "betas", "eps", "weight_decay", "torch_adam", "fused", "foreach", "adam_w_mode", "bias_correction",
)  # fmt: skip


def resolve_ds_config(settings: TrainSettings, world_size: int) -> dict[str, Any]:
    """Return the complete DeepSpeed configuration of a run.

    Raises UserError if the file contradicts the settings, has an unsupported key or value, or uses stage 0 with bf16. For a
    contradiction, the message names the file, the key, both values and the remedy.
    """
    name = settings.deepspeed or "the default ds_config"
    config: dict[str, Any] = {"zero_optimization": {"stage": 1}}
    if settings.deepspeed:
        config = _read(Path(settings.deepspeed))
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
    if settings.bf16 and zero_stage(config) == 0:
        # Measured after one step on 1 and 2 ranks: stages 1 to 3 have equal losses, and that of stage 0 differs by 0.8 %.
        raise UserError(
            f"{name}: DeepSpeed 0.19.8 updates the weights wrongly in bf16 at ZeRO stage 0; use ds_configs/zero1.json, "
            "which trains the same model on any number of ranks"
        )
    config.setdefault("steps_per_print", 1 << 30)  # DeepSpeed prints nothing; metrics.jsonl has every step
    config["checkpoint"] = {"tag_validation": "Ignore"}  # all ranks get the same tag, so skip the check
    _check_no_auto(config, name)
    return config


def zero_stage(config: dict[str, Any]) -> int:
    return int(config["zero_optimization"].get("stage", 0))


def offloads_optimizer(config: dict[str, Any]) -> bool:
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return bool(offload.get("device", "none") != "none")


def _resolve_optimizer(config: dict[str, Any], settings: TrainSettings, name: str) -> None:
    """Complete the section `optimizer`. The default is DeepSpeed's CPU Adam with offload, and torch's fused AdamW without.

    DeepSpeed's FusedAdam is not the default, because it compiles C++ at the first start. On a CPU it is also 10 times
    slower than torch's AdamW.
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
    if not offloads_optimizer(config) and parameters.setdefault("torch_adam", True):
        parameters.setdefault("fused", True)


def _check_zero(zero: dict[str, Any], name: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {key for field, info in fields.items() for key in (field, info.alias) if key}
    _check_keys(zero, tuple(sorted(known)), f"{name}: zero_optimization")
    if zero.setdefault("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"{name}: zero_optimization.stage is {zero['stage']!r}; choose 0, 1, 2 or 3")
    if not zero.get("compute_grad_norm", True):
        raise UserError(f"{name}: NaN gradients are detected by their norm; remove compute_grad_norm: false")

    for key in ("offload_optimizer", "offload_param"):
        offload = zero.get(key) or {}
        if offload.get("device") == "nvme":
            raise UserError(f"{name}: {key} to NVMe cannot be checkpointed here; use the device 'cpu'")
        if offload.get("ratio", 1.0) != 1.0:
            # With a ratio below 1, DeepSpeed 0.19.8 (stage3.py) does not save the Adam moments of parameters on the GPU.
            raise UserError(
                f"{name}: DeepSpeed does not save all moments if {key}.ratio is below 1; set it to 1"
            )


def _set_or_check(section: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set `section[key]` to `value` if the key is missing or "auto". Raises UserError if the key has another value."""
    if section.get(key, "auto") not in ("auto", value):
        text = f"{where}: {key} is {section[key]!r} but the settings say {value!r}"
        raise UserError(f'{text}; write "auto" in the ds_config')
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
        similar = did_you_mean(path.name, (other.name for other in path.parent.glob("*.json")))
        raise UserError(f"ds_config {path} does not exist{similar}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"ds_config {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"ds_config {path} is not a JSON object")
    return config
