"""Config and class of the text model inside a multimodal wrapper (Qwen3.5, Gemma 3 and 4, Mistral 3).

Only the text part is loaded, trained and exported. It has its own causal LM class and model type (`gemma3_text`), and gives
the same logits for text as the wrapper. The encoders for images and audio are left out to save memory and disk space.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.runtime import library_internals

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# settings that `causal_lm_config` copies from the wrapper's config if the text config lacks them
_INHERITED = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "dtype")


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the text part's config if `config` is a multimodal wrapper's, else `config` itself."""
    return config.get_text_config(decoder=True) if is_wrapper(config) else config


def is_wrapper(config: PreTrainedConfig) -> bool:
    """Return whether `config` is the config of a multimodal wrapper around a text model."""
    return "text_config" in getattr(config, "sub_configs", {}) and hasattr(config, "text_config")


def causal_lm_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """Return the config of the causal LM: `config` itself or, for a multimodal wrapper, a copy of the text config.

    The copy takes missing settings from the wrapper. Raises UserError for an encoder, or if no causal LM class exists.
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
    completed = copy.deepcopy(inner)
    if not has_causal_lm(completed):
        raise UserError(
            f"{name} is a multimodal model ({config.model_type}) and transformers cannot build its text part "
            f"({completed.model_type}) alone: choose a text model"
        )
    for key in _INHERITED:
        if getattr(completed, key, None) is None and getattr(config, key, None) is not None:
            setattr(completed, key, getattr(config, key))
    if hasattr(config, "tie_word_embeddings"):
        # The wrapper's class uses the wrapper's setting, not the text config's.
        completed.tie_word_embeddings = config.tie_word_embeddings
    completed.architectures = [model_class(completed).__name__]
    library_internals.copy_origin(completed, config)
    return completed


def has_causal_lm(config: PreTrainedConfig) -> bool:
    """Return whether transformers has a causal LM class for this config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return transformers' causal LM class for `config`. Raises UserError if there is no such class."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if not has_causal_lm(config):
        raise UserError(
            f"transformers has no causal language model for model type {config.model_type!r}: choose a decoder-only model"
        )
    mapped: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    classes = mapped if isinstance(mapped, (list, tuple)) else [mapped]
    by_name: dict[str, Any] = {class_.__name__: class_ for class_ in classes}
    return next((by_name[name] for name in config.architectures or () if name in by_name), classes[0])


def key_mapping(model: type[PreTrainedModel]) -> dict[str, str]:
    """Return the `key_mapping` with which `from_pretrained` loads the causal LM `model` from the files of a wrapper.

    In these files, the names of the text part's weights begin with `language_model.model.` (written by transformers 4),
    `model.language_model.` (transformers 5) or `language_model.` (Llama 4 in transformers 5).
    """
    # `body`: attribute that holds the decoder. Llama 4 has a wrong base_model_prefix, so use the prefix of a tied weight's name.
    tied, body = library_internals.tied_weight_keys(model), model.base_model_prefix
    if isinstance(tied, dict) and tied:
        body = next(iter(tied.values())).split(".")[0]
    return {
        r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
        r"^(?:model\.)?language_model\.(?:model\.)?": f"{body}.",
    }
