"""The text model inside a multimodal wrapper (Qwen3.5, Gemma 3 and 4, Mistral 3): it alone is loaded, trained and exported.

The text part has a causal LM class and a model type of its own (`gemma3_text`), computes the same logits for text, and
spares the memory, the files and the optimizer state of towers that no text reaches.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Of the wrapper's config, where the text config has none of its own.
_INHERITED = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "dtype")


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the text model: of a multimodal wrapper its text part, else `config` itself."""
    return config.get_text_config(decoder=True) if is_wrapper(config) else config


def is_wrapper(config: PreTrainedConfig) -> bool:
    """Return whether `config` is of a multimodal model with a text model inside."""
    return "text_config" in getattr(config, "sub_configs", {}) and hasattr(config, "text_config")


def causal_lm_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """Return the config of the causal LM that is built for `config`: a copy of a wrapper's text config, made complete.

    Raises UserError if transformers has no causal LM class for it, and for encoders, which see later tokens.
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
        found.tie_word_embeddings = (
            config.tie_word_embeddings
        )  # the wrapper's class asks the wrapper's config
    found.architectures = [model_class(found).__name__]
    found._name_or_path = config._name_or_path
    found._commit_hash = getattr(config, "_commit_hash", None)
    return found


def has_causal_lm(config: PreTrainedConfig) -> bool:
    """Return whether transformers has a causal LM class for this config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class transformers builds as the causal LM of `config`.

    Raises UserError if transformers has none for this model type.
    """
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
    """Return the renaming of a wrapper's weights to those of its text model, as `from_pretrained` takes it.

    Wrappers are saved as `language_model.model.*` (transformers 4), `model.language_model.*` or, Llama 4,
    `language_model.*` (transformers 5).
    """
    # The name of the body inside the causal LM. Llama 4's base_model_prefix is the wrapper's name for it.
    tied = getattr(model, "_tied_weights_keys", None)
    body = (
        next(iter(tied.values())).split(".")[0]
        if isinstance(tied, dict) and tied
        else model.base_model_prefix
    )
    return {
        r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
        r"^(?:model\.)?language_model\.(?:model\.)?": f"{body}.",
    }
