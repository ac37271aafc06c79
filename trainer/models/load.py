"""Load a causal LM, or make one with random weights, so that every rank and every ZeRO stage has the same numbers."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.models import presets
from trainer.models.loaded_weights import check_weights
from trainer.models.source import check_source, error_reason
from trainer.models.text_part import (
    causal_lm_config,
    has_causal_lm,
    is_wrapper,
    key_mapping,
    model_class,
    text_config,
)
from trainer.runtime import distributed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def load_config(name_or_path: str, overrides: str = "", vocabulary_size: int = 0) -> PreTrainedConfig:
    """Return the config of a causal LM, from a size name (`trainer.models.sizes`), a local folder or file, or the Hub.

    Of a multimodal wrapper it is the config of the text part (see `trainer.models.text_part`), which is what
    `load_model` loads. `overrides`: "n_layer=6,n_embd=384"; a value takes the type of what it replaces.
    Raises UserError for what holds no causal LM.
    """
    if name_or_path in presets.student_names():
        config = presets.student_config(name_or_path, vocabulary_size)
    else:
        config = causal_lm_config(_read_config(name_or_path), name_or_path)
    return apply_overrides(config, overrides)


def _read_config(name_or_path: str) -> PreTrainedConfig:
    """Return the config as it is written, a wrapper's whole. Raises UserError."""
    from transformers import AutoConfig

    check_source(name_or_path)
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many types for files it cannot read
        expected = (
            ""
            if Path(name_or_path).exists()
            else f" (a folder, a hub name, or one of {', '.join(presets.student_names())})"
        )
        raise UserError(f"no model config at {name_or_path}{expected}: {error_reason(error)}") from None


def apply_overrides(config: PreTrainedConfig, overrides: str) -> PreTrainedConfig:
    """Change a config in place: "n_layer=6,n_embd=384". Raises UserError."""
    for item in filter(None, overrides.split(",")):
        key, separator, text = item.partition("=")
        if not separator or not hasattr(config, key.strip()):
            raise UserError(
                f"config_overrides: {item!r} does not name a setting of a {config.model_type} config; write key=value"
            )
        setattr(config, key.strip(), _parse_like(getattr(config, key.strip()), text.strip(), item))
    return config


def check_vocabulary(config: PreTrainedConfig, max_token_id: int, name: str) -> None:
    """Refuse a model that has no embedding for a token that occurs.

    `max_token_id`: the largest that occurs in the shards, or that a text can have (`tokenizer.max_text_token_id`): a
    tokenizer may well have more tokens than its model has embeddings (Gemma 3). Raises UserError.
    """
    size = text_config(config).vocab_size
    if size <= max_token_id:
        raise UserError(
            f"{name} has {size} embeddings but token {max_token_id} occurs: "
            "prepare the shards with the model's own tokenizer"
        )


def context_length(config: PreTrainedConfig) -> int:
    """Return the longest sequence the positions of the model reach, or 0 if it has no limit."""
    return getattr(text_config(config), "max_position_embeddings", 0) or 0


def default_attention(config: PreTrainedConfig) -> str:
    """Return the attention implementation transformers chooses for `config`: "sdpa" if the class has it, else "eager"."""
    inner = text_config(config)
    return "sdpa" if model_class(inner if has_causal_lm(inner) else config)._supports_sdpa else "eager"


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
    name_or_path: str | Path,
    dtype: str,
    attention: str | None = None,
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Return the causal LM of a folder or Hub name, its weights as `dtype` ("fp32" | "bf16").

    Under ZeRO-3 (a live HfDeepSpeedConfig) the weights are loaded into shards, and the call is collective.
    Of a multimodal wrapper the text part alone is loaded. `attention`: an attention implementation; None chooses
    transformers' default (see `default_attention`). `config`: from `load_config`; None reads it. The dtype is always
    given: transformers 5 otherwise keeps the file's. Raises UserError if anything is missing or of another shape.
    """
    import torch
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    name, problem = str(name_or_path), None
    model: Any = None
    info: dict[str, Any]
    written = _read_config(name)
    config = config or causal_lm_config(written, name)
    model_type: Any = model_class(config)
    if is_wrapper(written):
        kwargs["key_mapping"] = key_mapping(model_type)
    try:
        with _loaded_rows_kept():
            model, info = model_type.from_pretrained(
                name,
                config=config,
                dtype=getattr(torch, TORCH_DTYPES[dtype]),
                attn_implementation=attention or default_attention(config),
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                **kwargs,
            )
        check_weights(model, info, name, written)
        if is_wrapper(written):
            # Otherwise save_pretrained would write the wrapper's names beside the text config.
            model.__dict__.pop("_weight_conversions", None)
    except UserError as error:
        problem = str(error)
    except Exception as error:  # transformers raises errors of many types for files it cannot read
        if isinstance(error, torch.OutOfMemoryError) or distributed.is_communication_failure(error):
            raise
        traceback.print_exc()  # into the log
        problem = f"no model at {name} (a local folder or a hub name): {error_reason(error)}"
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise UserError(problem) from None  # under ZeRO-3 the other ranks may wait in a collective
    if is_deepspeed_zero3_enabled():
        distributed.raise_on_all_ranks(problem)  # only rank 0 reads the weights
    elif problem is not None:
        raise UserError(problem)
    assert model is not None
    return model


@contextlib.contextmanager
def _loaded_rows_kept() -> Iterator[None]:
    """Context manager in which transformers does not set a part of a tensor to zero.

    transformers 5 marks what it has read from a file as initialised, but a row of it (`weight[padding_idx]`) has no mark:
    families that set the padding row to zero (Youtu, RecurrentGemma) would lose the row that the file holds.
    """
    from transformers import initialization

    original = initialization.zeros_
    initialization.zeros_ = lambda tensor: tensor if tensor._base is not None else original(tensor)
    try:
        yield
    finally:
        initialization.zeros_ = original


def empty_model(config: PreTrainedConfig, dtype: str, attention: str | None = None) -> PreTrainedModel:
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


def _parse_like(old: Any, text: str, where: str) -> Any:
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
