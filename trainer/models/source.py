"""Detect folders and Hub repositories without a loadable causal LM. Each error message names a remedy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ADAPTER = "adapter_config.json"
_MAX_REASON = 300  # characters
_QUANTISATION_PACKAGES = ("gptq", "awq", "bitsandbytes", "optimum", "quant", "compressed-tensors", "hqq")


def check_source(name: str) -> None:
    """Raise UserError if `name` is a missing local path, a folder without a model, an adapter, or a GGUF model."""
    check_local(name)
    check_gguf(name)
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in ("config.json", _ADAPTER)):
        raise UserError(
            f"{name} holds no model (it has no config.json); give an export, a folder of save_pretrained, or a Hub name"
        )
    if _has_adapter(name):
        raise UserError(
            f"{name} holds an adapter ({_ADAPTER}), not a plain model: merge it first (peft: merge_and_unload, then "
            f"save_pretrained with the tokenizer) and give the merged folder, or remove {_ADAPTER} to use the model beside it "
            "without the adapter"
        )


def check_local(name: str) -> None:
    """Raise UserError if `name` can only be a local path, not a Hub name, and does not exist."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).exists():
        raise UserError(
            f"{name} does not exist; give a local folder or a Hub name such as openai-community/gpt2"
        )


def check_gguf(name: str) -> None:
    """Raise UserError for a GGUF file and for a folder whose only weights are GGUF files."""
    path = Path(name)
    has_other_weights = any(path.glob("*.safetensors*")) or any(path.glob("pytorch_model*.bin*"))
    if path.suffix == ".gguf" or (any(path.glob("*.gguf")) and not has_other_weights):
        raise UserError(
            f"{name} is in GGUF, a quantised format for inference: give the folder or Hub name of the original model "
            "in safetensors"
        )


def check_trainable(config: PreTrainedConfig, name: str) -> None:
    """Raise UserError if the config declares quantised weights, which have no gradients."""
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
        method = settings.get("quant_method", "unknown method")  # "gptq", "fp8", ...
        raise UserError(
            f"{name} holds quantised weights ({getattr(method, 'value', method)}), which cannot be trained: give the model's "
            "original weights, or load it with transformers (dequantize=True where the method has it), save it without "
            "quantization_config, and give that"
        )


def error_reason(error: Exception) -> str:
    """Return the cause of a failed load in one line. For known causes, a remedy follows."""
    text = " ".join(str(error).split())
    lower = text.lower()
    if "custom code" in lower or "trust_remote_code" in lower:
        return (
            "it needs Python code of its own (trust_remote_code), which this program never runs; "
            "choose a model type of transformers"
        )
    if isinstance(error, ImportError) or any(f"`{package}`" in lower for package in _QUANTISATION_PACKAGES):
        is_quantised = any(package in lower for package in _QUANTISATION_PACKAGES)
        remedy = "; use the model's original weights, or install that package" if is_quantised else ""
        return f"{_shortened(text)}{remedy}"
    if "does not recognize this architecture" in lower:
        return f"{_shortened(text.split('. ')[0])}; choose a model type of the installed transformers"
    if "weights_only" in lower:
        return "its weights file is damaged, or holds more than weights; give the model in safetensors"
    error_type = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return error_type + (_shortened(text) or "no reason was given")


def _shortened(text: str) -> str:
    if len(text) <= _MAX_REASON:
        return text
    end = text.rfind(". ", 0, _MAX_REASON)
    return text[: end + 1] if end > 0 else text[:_MAX_REASON] + " ..."


def _has_adapter(name: str) -> bool:
    try:
        return not os.path.isfile(name) and find_file(name, _ADAPTER) is not None
    except (OSError, ValueError):
        return False  # `name` is neither a folder nor a Hub name; loading the config reports this error


def find_file(name: str, file: str) -> str | None:
    """Return the local path of `file` in the folder or Hub repository `name`. Downloads the file if needed.

    Returns None if the file is missing, the repository is gated, or the Hub cannot be reached.
    """
    from transformers.utils import cached_file

    conditions = ("gated_repo", "missing_entries", "connection_errors")
    quiet: dict[str, Any] = {f"_raise_exceptions_for_{condition}": False for condition in conditions}
    return cached_file(name, file, **quiet)  # type: ignore[no-any-return]
