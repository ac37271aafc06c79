"""Tiny models with random weights of every decoder-only family of the installed transformers, and variants of them.

`families()` reads transformers' registry, so that a new release adds rows; variants.py adds variants that a default
configuration does not cover. `excluded()` returns the other model types, each with a reason.

    family = family_of("gemma2-window")
    model = family.build()
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.models.small_configs import LONG, VOCABULARY, small
from tests.models.variants import VARIANTS, WINDOWS

__all__ = ["VOCABULARY", "Family", "excluded", "families", "family_of", "names"]

SHORT_WINDOW = 16  # tokens; shorter than every example and text of the tests

# Decoders whose config has `is_decoder = False`, which their classes do not read.
_DECODERS = ("gpt_neox", "gpt_neox_japanese")

# Exclusions that no rule finds. The three that look ahead are not causal in the form that the registry builds.
_EXCLUDED = {
    "blt": "reads bytes in patches that a second model chooses; it has no tokenizer of its own",
    "cpmant": "looks ahead inside its prompt",
    "gemma3n": "its vision tower needs the package timm; the text part is a row",
    "gemma4_assistant": "drafts tokens from another model's hidden states",
    "gemma4_unified_assistant": "drafts tokens from another model's hidden states",
    "moshi": "predicts audio codes beside the text",
    "xlm": "looks ahead: a masked language model",
    "xlnet": "looks ahead: a permutation language model",
}

# Names of rows that differ from the model type: the text part has the short name, the wrapper another.
_NAMES = {
    "gemma3": "gemma3-4b",
    "gemma3_text": "gemma3",
    "gemma3n_text": "gemma3n",
    "gemma4": "gemma4-vision",
    "gemma4_text": "gemma4",
    "llama4": "llama4-vision",
    "llama4_text": "llama4",
}


@dataclass(frozen=True)
class Family:
    """Row of the table: a model family, or a variant of one.

    settings: differences from the small default configuration.
    """

    name: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def _config(self) -> PreTrainedConfig:
        return small(self.model_type, **copy.deepcopy(self.settings))

    @property
    def config(self) -> PreTrainedConfig:
        """Return a copy of the configuration: building a model changes it."""
        return copy.deepcopy(self._config)

    @property
    def text_config(self) -> PreTrainedConfig:
        return self.config.get_text_config(decoder=True)

    def build(self, seed: int = 0) -> PreTrainedModel:
        """Return the model, for a wrapper the whole, in fp32 and evaluation mode with random weights.

        Parameters with equal initial values (biases, norms, sinks) get noise, so that an omitted one changes the results.
        """
        torch.manual_seed(seed)
        config = self.config
        model = _published_class(config)._from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and bool((parameter == parameter.flatten()[0]).all()):
                    parameter += 0.1 * torch.randn_like(parameter)
        if model.generation_config is not None:
            model.generation_config.eos_token_id = None
        return model.eval()

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Write the model's configuration and weights into `folder` and return it."""
        self.build(seed).save_pretrained(folder)
        return folder


def excluded() -> dict[str, str]:
    """Return the reason for each model type of transformers' registry of causal LMs that is no row."""
    reasons = {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if model_type in _EXCLUDED:
            reasons[model_type] = _EXCLUDED[model_type]
            continue
        with _quiet():
            published = CONFIG_MAPPING[model_type]()
        if published.is_encoder_decoder:
            reasons[model_type] = "an encoder-decoder"
        elif getattr(published, "is_decoder", None) is False and model_type not in _DECODERS:
            reasons[model_type] = "an encoder: a causal LM only with is_decoder=True"
    return reasons


@functools.cache
def _all() -> dict[str, Family]:
    rows = {}
    with _quiet():
        left_out = excluded()
        for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            if model_type in left_out:
                continue
            name = _NAMES.get(model_type, model_type)
            if name.endswith("_text") and name.removesuffix("_text") in CONFIG_MAPPING:
                name = name.removesuffix("_text") + "-text"
            rows[name] = Family(name, model_type)
        for name, (model_type, settings) in VARIANTS.items():
            rows[name] = Family(name, model_type, settings)
        for family in list(rows.values()):
            rows |= {row.name: row for row in _with_short_windows(family) if row.name not in rows}
    return dict(sorted(rows.items()))


def families() -> Iterator[Family]:
    """Yield every row, by name."""
    yield from _all().values()


def names() -> list[str]:
    """Return the names of all rows."""
    return list(_all())


def family_of(name: str) -> Family:
    """Return the row of that name."""
    return _all()[name]


def _with_short_windows(family: Family) -> Iterator[Family]:
    """Yield a row with a window or chunk shorter than the examples for a family whose default is longer."""
    if family.name in VARIANTS:
        return
    try:
        text = family.text_config
        is_wrapper = type(text) is not type(family.config)
    except Exception:  # of any type: reported in the family's own row
        return
    if is_wrapper:
        return
    for name, suffix in WINDOWS.items():
        if vars(text).get(text.attribute_map.get(name, name)) == LONG:
            yield Family(f"{family.name}-{suffix}", family.model_type, {name: SHORT_WINDOW})
            return


def _published_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of published folders: for a wrapper the multimodal class, not the causal LM."""
    mappings = [MODEL_FOR_CAUSAL_LM_MAPPING]
    if config.get_text_config(decoder=True) is not config:
        mappings = [MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, *mappings]
    for mapping in mappings:
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple | list) else found
    raise KeyError(f"transformers has no causal LM for {config.model_type}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context manager that silences warnings about token ids of published defaults."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
