"""Config and class of the text model inside a multimodal wrapper (Qwen3.5, Gemma 3 and 4, Mistral 3).

Only the text part is loaded, trained and exported. It has its own causal LM class and model type (`gemma3_text`), gives
the same logits for text, and saves the memory, files and optimizer state of the other towers.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.runtime import library_internals

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Taken from the wrapper's config if the text config has no value.
_INHERITED = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "dtype")


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the text part of a multimodal wrapper, else `config` itself."""
    return config.get_text_config(decoder=True) if is_wrapper(config) else config


def is_wrapper(config: PreTrainedConfig) -> bool:
    """Return whether `config` is that of a multimodal wrapper around a text model."""
    return "text_config" in getattr(config, "sub_configs", {}) and hasattr(config, "text_config")


def causal_lm_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """Return the config of the causal LM for `config`: for a wrapper a completed copy of its text config.

    Raises UserError for encoders and if transformers has no causal LM class for it.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    inner = text_config(config)
    if inner is config:
        model_class(config)
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
            raise UserError(
                f"{name} is an encoder ({config.model_type} without is_decoder), whose tokens see those that follow: "
                "choose a decoder-only model"
            )
        return config
    found = copy.deepcopy(inner)
    if not has_causal_lm(found):
        raise UserError(
            f"{name} is a multimodal model ({config.model_type}) and transformers cannot build its text part "
            f"({found.model_type}) alone: choose a text model"
        )
    for key in _INHERITED:
        if getattr(found, key, None) is None and getattr(config, key, None) is not None:
            setattr(found, key, getattr(config, key))
    if hasattr(config, "tie_word_embeddings"):
        # The wrapper's class reads the wrapper's setting.
        found.tie_word_embeddings = config.tie_word_embeddings
    found.architectures = [model_class(found).__name__]
    library_internals.copy_origin(found, config)
    return found


def has_causal_lm(config: PreTrainedConfig) -> bool:
    """Return whether transformers has a causal LM class for this config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return transformers' causal LM class for `config`. Raises UserError if there is none for its model type."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if not has_causal_lm(config):
        raise UserError(
            f"transformers has no causal language model for model type {config.model_type!r}: choose a decoder-only model"
        )
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(found, (list, tuple)):
        return found  # type: ignore[no-any-return]
    by_name: dict[str, Any] = {known.__name__: known for known in found}
    return next((by_name[name] for name in config.architectures or () if name in by_name), found[0])


def key_mapping(model: type[PreTrainedModel]) -> dict[str, str]:
    """Return the `key_mapping` argument of `from_pretrained` that maps a wrapper's weight names to its text model's.

    Wrappers are saved as `language_model.model.*` (transformers 4), `model.language_model.*` or, Llama 4,
    `language_model.*` (transformers 5).
    """
    # Name of the body inside the causal LM; Llama 4's base_model_prefix is the name inside the wrapper.
    tied, body = library_internals.tied_weight_keys(model), model.base_model_prefix
    if isinstance(tied, dict) and tied:
        body = next(iter(tied.values())).split(".")[0]
    return {
        r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
        r"^(?:model\.)?language_model\.(?:model\.)?": f"{body}.",
    }
