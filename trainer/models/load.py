"""Load a causal LM, or make one with random weights, so that every rank and every ZeRO stage has the same numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.models import sizes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def load_config(name_or_path: str, overrides: str = "", vocabulary_size: int = 0) -> PreTrainedConfig:
    """Config from a size name (`trainer.models.sizes`), a local folder or file, or the hub.

    `overrides`: "n_layer=6,n_embd=384"; a value takes the type of what it replaces. Raises UserError.
    """
    from transformers import AutoConfig

    if name_or_path in sizes.names():
        config = sizes.config(name_or_path, vocabulary_size)
    else:
        try:
            config = AutoConfig.from_pretrained(name_or_path)
        except (OSError, ValueError, KeyError) as error:
            known = ", ".join(sizes.names())
            reason = str(error).splitlines()[0]
            raise UserError(
                f"no model config at {name_or_path} (a folder, a hub name, or one of {known}): {reason}"
            ) from None
    return override(config, overrides)


def override(config: PreTrainedConfig, overrides: str) -> PreTrainedConfig:
    """Change a config in place: "n_layer=6,n_embd=384". Raises UserError."""
    for item in filter(None, overrides.split(",")):
        key, separator, text = item.partition("=")
        if not separator or not hasattr(config, key.strip()):
            raise UserError(
                f"config_overrides: {item!r} does not name a setting of a {config.model_type} config; write key=value"
            )
        setattr(config, key.strip(), _like(getattr(config, key.strip()), text.strip(), item))
    return config


def check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a model that has no embedding for some tokens. Raises UserError."""
    if config.vocab_size < len(tokenizer):
        raise UserError(
            f"{name} has {config.vocab_size} embeddings but the shards' tokenizer has {len(tokenizer)} tokens: "
            "prepare the shards with the model's own tokenizer"
        )


def context_length(config: PreTrainedConfig) -> int:
    """Longest sequence the positions of the model reach, or 0 if it has no limit."""
    return getattr(config, "max_position_embeddings", 0) or 0


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the text model: of a multimodal wrapper its text part, else `config` itself."""
    return config.get_text_config(decoder=True)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class transformers builds as the causal LM of `config`.

    Raises UserError if transformers has none for this model type.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise UserError(
            f"transformers has no causal language model for model type {config.model_type!r}: choose a decoder-only model"
        ) from None
    if not isinstance(found, (list, tuple)):
        return found  # type: ignore[no-any-return]
    by_name: dict[str, Any] = {known.__name__: known for known in found}
    return next((by_name[name] for name in config.architectures or () if name in by_name), found[0])


def default_attention(config: PreTrainedConfig) -> str:
    """Return the attention implementation transformers chooses for `config`: "sdpa" if the class has it, else "eager"."""
    return "sdpa" if model_class(config)._supports_sdpa else "eager"


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The model's modules without any memory, to count and name its parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks a transformers model repeats: what it recomputes as one under gradient checkpointing."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def num_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the model, tied ones once."""
    return sum(parameter.numel() for parameter in build_on_meta(config).parameters())


def write_random_weights(config: PreTrainedConfig, seed: int, folder: Path) -> None:
    """Initialise in fp32 on the CPU from `seed` and save.

    One process writes, all load: `deepspeed.zero.Init` around a constructor runs transformers' initialisation on
    empty shards and gives other, wrong numbers (a first loss of 85 instead of 9 for GPT-2).
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)


def load_model(
    name_or_path: str | Path, dtype: str, attention: str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load weights as `dtype` ("fp32" | "bf16"); under ZeRO-3 (a live HfDeepSpeedConfig) into shards.

    `attention`: an attention implementation; None chooses transformers' default (see `default_attention`).
    The dtype is always given: transformers 5 otherwise keeps the file's. Raises UserError.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            str(name_or_path),
            dtype=getattr(torch, TORCH_DTYPES[dtype]),
            attn_implementation=attention,
            **kwargs,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"no model at {name_or_path} (a local folder or a hub name): {str(error).splitlines()[0]}"
        ) from None


def blank_model(config: PreTrainedConfig, dtype: str, attention: str | None = None) -> PreTrainedModel:
    """The model with whatever lies in memory for weights, to read a checkpoint into; its buffers are made as always.

    Neither a seed nor a pretrained model's files are asked for: a run that goes on does not wait for them.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights(), _empty_shards():
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, TORCH_DTYPES[dtype]),
            attn_implementation=attention,
            trust_remote_code=False,
        )
    model.tie_weights()  # a part of the initialisation
    return model


@contextlib.contextmanager
def _empty_shards() -> Iterator[None]:
    """Under ZeRO-3 (a live HfDeepSpeedConfig): what transformers does to make a model in shards, but for what follows.

    It would gather all parameters from all ranks to initialise them, half the time of building the engine.
    """
    from transformers.integrations.deepspeed import (
        deepspeed_config,
        is_deepspeed_zero3_enabled,
        prevent_arange_dtype_change,
    )
    from transformers.modeling_utils import set_zero3_state

    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    shards = deepspeed.zero.Init(config_dict_or_path=deepspeed_config())
    with prevent_arange_dtype_change(), shards, set_zero3_state():
        yield


def device() -> torch.device:
    """The accelerator of this rank (`distributed.initialize` has chosen it), else the CPU."""
    import torch

    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def _like(old: Any, text: str, where: str) -> Any:
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(old, int):
            return int(text)
        if isinstance(old, float):
            return float(text)
    except (ValueError, KeyError):
        raise UserError(f"config_overrides: {where!r} is not of the type of {old!r}") from None
    if old is None and text.isdigit():
        return int(text)
    return text
