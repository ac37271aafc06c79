"""Error messages, with a remedy, for folders and Hub names that hold no plain causal LM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ADAPTER = "adapter_config.json"
_MAX_REASON = 300
_QUANTISATION_PACKAGES = ("gptq", "awq", "bitsandbytes", "optimum", "quant", "compressed-tensors", "hqq")


def check_source(name: str) -> None:
    """Raise UserError if `name`, a local folder or file or a Hub name, holds an adapter or a GGUF model."""
    check_gguf(name)
    if _has_adapter(name):
        raise UserError(
            f"{name} holds an adapter ({_ADAPTER}), not a plain model: merge it first (peft: merge_and_unload, then "
            f"save_pretrained with the tokenizer) and give the merged folder, or remove {_ADAPTER} to use the model beside it "
            "without the adapter"
        )


def check_gguf(name: str) -> None:
    """Raise UserError for a GGUF file and for a folder with no other weights."""
    path = Path(name)
    others = ("*.safetensors*", "pytorch_model*.bin*")
    holds_only_gguf = any(path.glob("*.gguf")) and not any(any(path.glob(pattern)) for pattern in others)
    if path.suffix == ".gguf" or holds_only_gguf:
        raise UserError(
            f"{name} is in GGUF, a quantised format for inference: give the folder or Hub name of the original model "
            "in safetensors"
        )


def check_trainable(config: PreTrainedConfig, name: str) -> None:
    """Raise UserError if the config names quantised weights, which have no gradients."""
    found = getattr(config, "quantization_config", None)
    if found:
        values = found if isinstance(found, dict) else found.to_dict()
        method = values.get("quant_method", "unknown method")  # "gptq", "fp8", ...
        raise UserError(
            f"{name} holds quantised weights ({getattr(method, 'value', method)}), which cannot be trained: give the model's "
            "original weights, or load it with transformers (dequantize=True where the method has it), save it without "
            "quantization_config, and give that"
        )


def error_reason(error: Exception) -> str:
    """Return the cause of a failed load in one line, with a remedy if one is known."""
    text = " ".join(str(error).split())
    lower = text.lower()
    if "custom code" in lower or "trust_remote_code" in lower:
        return (
            "it needs Python code of its own (trust_remote_code), which this program never runs; "
            "choose a model type of transformers"
        )
    if isinstance(error, ImportError) or any(f"`{package}`" in lower for package in _QUANTISATION_PACKAGES):
        quantised = any(package in lower for package in _QUANTISATION_PACKAGES)
        remedy = "; use the model's original weights, or install that package" if quantised else ""
        return f"{_shortened(text)}{remedy}"
    if "does not recognize this architecture" in lower:
        return f"{_shortened(text.split('. ')[0])}; choose a model type of the installed transformers"
    if "weights_only" in lower:
        return "its weights file is damaged, or holds more than weights; give the model in safetensors"
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return kind + (_shortened(text) or "no reason was given")


def _shortened(text: str) -> str:
    if len(text) <= _MAX_REASON:
        return text
    end = text.rfind(". ", 0, _MAX_REASON)
    return text[: end + 1] if end > 0 else text[:_MAX_REASON] + " ..."


def _has_adapter(name: str) -> bool:
    try:
        return not os.path.isfile(name) and find_file(name, _ADAPTER) is not None
    except (OSError, ValueError):
        return False  # neither a folder nor a Hub name: loading its config raises the error


def find_file(name: str, file: str) -> str | None:
    """Return the local path of `file` in a folder or Hub repository (downloaded if needed); None if it has no such file."""
    from transformers.utils import cached_file

    conditions = ("gated_repo", "missing_entries", "connection_errors")
    quiet: dict[str, Any] = {f"_raise_exceptions_for_{condition}": False for condition in conditions}
    return cached_file(name, file, **quiet)  # type: ignore[no-any-return]
