"""Load a causal LM, or make one with random weights, with the same numbers on every rank and in every ZeRO stage."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.models import presets
from trainer.models.source import check_source, error_reason
from trainer.models.text_part import (
    causal_lm_config,
    has_causal_lm,
    is_wrapper,
    key_mapping,
    model_class,
    text_config,
)
from trainer.runtime import distributed, library_internals, terminal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # names of this program -> torch's
_NUM_NAMED = 3  # weights in an error message
# Type of a setting -> its value in `config_overrides`; raises ValueError or KeyError.
_PARSERS: dict[type, Callable[[str], Any]] = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: int,
    float: float,
}


def load_config(name_or_path: str, overrides: str = "", vocabulary_size: int = 0) -> PreTrainedConfig:
    """Return the config of a causal LM: a preset (`trainer.models.presets`), a local folder or file, or a Hub name.

    For a multimodal wrapper it is the config of the text part (`trainer.models.text_part`), which `load_model` loads.
    `overrides`: see `apply_overrides`. `vocabulary_size`: of a preset. Raises UserError if it is no causal LM.
    """
    if name_or_path in presets.student_names():
        config = presets.student_config(name_or_path, vocabulary_size)
    else:
        config = causal_lm_config(_read_config(name_or_path), name_or_path)
    return apply_overrides(config, overrides)


def _read_config(name_or_path: str) -> PreTrainedConfig:
    """Return the config of a local folder or file or a Hub name, for a wrapper the whole. Raises UserError."""
    from transformers import AutoConfig

    check_source(name_or_path)
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many types for files it cannot read
        expected = f" (a folder, a hub name, or one of {', '.join(presets.student_names())})"
        if Path(name_or_path).exists():
            expected = ""
        raise UserError(f"no model config at {name_or_path}{expected}: {error_reason(error)}") from None


def apply_overrides(config: PreTrainedConfig, overrides: str) -> PreTrainedConfig:
    """Set `overrides`, e.g. "n_layer=6,n_embd=384", in `config` and return it; a value is parsed as the type it replaces.

    Raises UserError for an unknown setting or another type.
    """
    for item in filter(None, overrides.split(",")):
        key, separator, text = (part.strip() for part in item.partition("="))
        if not separator or not hasattr(config, key):
            raise UserError(
                f"config_overrides: {item!r} does not name a setting of a {config.model_type} config; write key=value"
            )
        old = getattr(config, key)
        kind = int if old is None and text.isdigit() else type(old)
        try:
            value = _PARSERS.get(kind, str)(text)
        except (ValueError, KeyError):
            raise UserError(f"config_overrides: {item!r} is not of the type of {old!r}") from None
        setattr(config, key, value)
    return config


def check_vocabulary(config: PreTrainedConfig, max_token_id: int, name: str) -> None:
    """Raise UserError if the model has no embedding for token `max_token_id`.

    `max_token_id`: the largest in the shards, or in any text (`tokenizer.max_text_token_id`), not in the tokenizer, which
    may have more tokens than its model has embeddings (Gemma 3).
    """
    size = text_config(config).vocab_size
    if size <= max_token_id:
        raise UserError(
            f"{name} has {size} embeddings but token {max_token_id} occurs: "
            "prepare the shards with the model's own tokenizer"
        )


def context_length(config: PreTrainedConfig) -> int:
    """Return the longest sequence, in tokens, that the positions of the model reach; 0 if there is no limit."""
    return getattr(text_config(config), "max_position_embeddings", 0) or 0


def default_attn_implementation(config: PreTrainedConfig) -> str:
    """Return the attention implementation that transformers chooses for `config`: "sdpa" or "eager"."""
    inner = text_config(config)
    class_ = model_class(inner if has_causal_lm(inner) else config)
    return "sdpa" if library_internals.supports_sdpa(class_) else "eager"


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model on the meta device, without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules of a transformers model that gradient checkpointing recomputes as one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def num_parameters(config: PreTrainedConfig) -> int:
    """Return the number of parameters of the model, tied ones counted once."""
    return sum(parameter.numel() for parameter in build_on_meta(config).parameters())


def write_random_weights(config: PreTrainedConfig, seed: int, folder: Path) -> None:
    """Initialise a model in fp32 on the CPU from `seed` and save it into `folder`.

    One process must write and all load: `deepspeed.zero.Init` around a constructor runs transformers' initialisation on
    empty shards, with wrong numbers (a first loss of 85 instead of 9 for GPT-2).
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
) -> PreTrainedModel:
    """Return the causal LM of a local folder or Hub name with weights in `dtype` ("fp32" | "bf16").

    Of a multimodal wrapper only the text part is loaded. `attention`: an attention implementation; None: transformers'
    default (see `default_attention`). `config`: from `load_config`; None reads it. Under ZeRO-3 (a live
    HfDeepSpeedConfig) the weights are loaded into shards, and the call is collective. Raises UserError if a weight is
    missing or has another shape.
    """
    import torch
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    name, problem = str(name_or_path), None
    model: Any = None
    written = _read_config(name)
    config = config or causal_lm_config(written, name)
    class_: Any = model_class(config)
    try:
        with _keep_loaded_rows():
            model, info = class_.from_pretrained(
                name,
                config=config,
                dtype=getattr(torch, DTYPES[dtype]),  # without it transformers 5 keeps the file's
                attn_implementation=attention or default_attn_implementation(config),
                ignore_mismatched_sizes=True,  # _check_weights reports them
                output_loading_info=True,
                key_mapping=key_mapping(class_) if is_wrapper(written) else None,
            )
        _check_weights(model, info, name, written)
        if is_wrapper(written):
            # Without this save_pretrained would write the wrapper's names beside the text config.
            model.__dict__.pop("_weight_conversions", None)
    except UserError as error:
        problem = str(error)
    except Exception as error:  # transformers raises errors of many types for files it cannot read
        if isinstance(error, torch.OutOfMemoryError) or distributed.is_communication_failure(error):
            raise
        traceback.print_exc()
        problem = f"no model at {name} (a local folder or a hub name): {error_reason(error)}"
        # After any other error ranks may be waiting in a collective of from_pretrained, so no further one is possible.
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise UserError(problem) from None
    if is_deepspeed_zero3_enabled():
        distributed.raise_on_all_ranks(problem)  # only rank 0 reads the weights
    elif problem is not None:
        raise UserError(problem)
    assert model is not None
    return model


def _check_weights(
    model: PreTrainedModel, info: dict[str, Any], name: str, written: PreTrainedConfig
) -> None:
    """Raise UserError for missing weights and weights of another shape; report unexpected ones in one line on rank 0.

    `info`: the loading info of `from_pretrained`, from which transformers has removed tied weights and those that a
    family computes. `written`: the config of the folder, for a wrapper the whole.
    """
    problems = []
    if missing := sorted(info["missing_keys"]):
        problems.append(
            f"{_count(missing, ' the model needs is', ' the model needs are')} not in its files ({_some(missing)})"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        shapes = [
            f"{key}: {list(in_file)} in the file, {list(in_model)} in the model"
            for key, in_file, in_model in mismatched
        ]
        problems.append(
            f"{_count(shapes, ' has', ' have')} another shape than the config says ({_some(shapes)})"
        )
    unexpected = sorted(info["unexpected_keys"] or _unexpected_under_zero3(model, name))
    if problems:
        held = f"; its files hold {_some(unexpected)} instead" if unexpected and missing else ""
        raise UserError(
            f"{name}: {' and '.join(problems)}{held}. transformers would fill them with random numbers: "
            "give a complete model whose config.json matches its weights"
        )
    if is_wrapper(written):
        terminal.info(
            f"{name} is multimodal ({written.model_type}): its text part ({model.config.model_type}) alone is used and exported"
            + (f"; {_count(unexpected)} of the other parts are left out" if unexpected else "")
        )
    elif unexpected:
        terminal.warning(
            f"{name} holds {_count(unexpected)} the model does not use ({_some(unexpected)}): left out"
        )


def _unexpected_under_zero3(model: PreTrainedModel, name: str) -> set[str]:
    """Return the weights in a local folder's files that the model lacks, which transformers does not report under ZeRO-3."""
    from transformers.core_model_loading import WeightConverter, rename_source_key
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.utils.loading_report import LoadStateDictInfo

    if not is_deepspeed_zero3_enabled():
        return set()
    changes = library_internals.weight_conversions(model)
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings = [change for change in changes if not isinstance(change, WeightConverter)]
    ours = model.state_dict()
    renamed = (
        rename_source_key(key, renamings, converters, model.base_model_prefix, ours)[0]
        for key in _names_in_files(Path(name))
    )
    found = LoadStateDictInfo(set(), {key for key in renamed if key not in ours}, set(), [], {}, set())
    library_internals.leave_out_expected_extras(model, found)
    return found.unexpected_keys


def _names_in_files(folder: Path) -> set[str]:
    """Return the names of the weights in the safetensors files that transformers loads from `folder`."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", "pt") as file:
            return set(file.keys())
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    return set()


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    rest = len(shown) - _NUM_NAMED
    return ", ".join(shown[:_NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _count(names: list[str], one: str = "", several: str = "") -> str:
    """Return "1 weight" or "2 weights", then the verb for that number."""
    return f"1 weight{one}" if len(names) == 1 else f"{len(names)} weights{several}"


@contextlib.contextmanager
def _keep_loaded_rows() -> Iterator[None]:
    """Context manager in which transformers' initialisation does not zero views of tensors.

    transformers 5 marks loaded tensors as initialised, but not their views: families that zero the padding row
    (`weight[padding_idx]`: Youtu, RecurrentGemma) would lose the row of the file.
    """
    from transformers import initialization

    original = initialization.zeros_
    initialization.zeros_ = lambda tensor: tensor if library_internals.is_view(tensor) else original(tensor)
    try:
        yield
    finally:
        initialization.zeros_ = original


def empty_model(config: PreTrainedConfig, dtype: str, attention: str | None = None) -> PreTrainedModel:
    """Return a model with uninitialised weights, to load a checkpoint into; its buffers are initialised.

    A resumed run needs neither a seed nor the pretrained model's files.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights(), _empty_shards():
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, DTYPES[dtype]),
            attn_implementation=attention,
            trust_remote_code=False,
        )
    model.tie_weights()  # a part of the initialisation
    return model


@contextlib.contextmanager
def _empty_shards() -> Iterator[None]:
    """Context manager that creates a model in ZeRO-3 shards if there is a live HfDeepSpeedConfig, without initialisation.

    transformers' own path also gathers all parameters from all ranks to initialise them: half the time of building the
    engine.
    """
    from transformers.integrations import deepspeed as integration
    from transformers.modeling_utils import set_zero3_state

    if not integration.is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    shards = deepspeed.zero.Init(config_dict_or_path=integration.deepspeed_config())
    with integration.prevent_arange_dtype_change(), shards, set_zero3_state():
        yield


def device() -> torch.device:
    """Return the accelerator that `distributed.initialize` selected for this rank, else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
