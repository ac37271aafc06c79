"""Load or initialise a causal LM. The weights are the same on every rank and in every ZeRO stage."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.models import presets, text_part
from trainer.models.source import check_source, error_reason
from trainer.runtime import distributed, library_internals, terminal
from trainer.storage.configuration import did_you_mean

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

TORCH_DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_MAX_LISTED = 3  # maximum number of weights that a message lists


def load_config(name_or_path: str, overrides: str = "", vocabulary_size: int = 0) -> PreTrainedConfig:
    """Return the config of a causal LM: a preset (`trainer.models.presets`), a local folder or file, or a Hub name.

    For a multimodal wrapper, return the config of its text part (`trainer.models.text_part`), which `load_model` loads.
    overrides: see `apply_overrides`. vocabulary_size: for presets only. Raises UserError if `name_or_path` is not a causal LM.
    """
    if name_or_path in presets.student_names():
        config = presets.student_config(name_or_path, vocabulary_size)
    else:
        config = text_part.causal_lm_config(_read_config(name_or_path), name_or_path)
    return apply_overrides(config, overrides)


def _read_config(name_or_path: str) -> PreTrainedConfig:
    """Return the config of a folder, file or Hub name; for a wrapper, the whole config. Raises UserError if loading fails."""
    from transformers import AutoConfig

    check_source(name_or_path)
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many types for files it cannot read
        known = f" (a folder, a hub name, or one of {', '.join(presets.student_names())})"
        expected = "" if Path(name_or_path).exists() else known
        raise UserError(f"no model config at {name_or_path}{expected}: {error_reason(error)}") from None


def apply_overrides(config: PreTrainedConfig, overrides: str) -> PreTrainedConfig:
    """Set `overrides`, e.g. "n_layer=6,n_embd=384", in `config` and return `config`.

    A value is parsed as the type of the old value. Raises UserError for an unknown setting and for a value of another type.
    """
    for item in filter(None, overrides.split(",")):
        key, separator, text = (part.strip() for part in item.partition("="))
        if not separator:
            raise UserError(f"config_overrides: {item!r} is not key=value")
        if not hasattr(config, key):
            similar = did_you_mean(key, config.to_dict())
            raise UserError(f"config_overrides: a {config.model_type} config has no setting {key!r}{similar}")
        old = getattr(config, key)
        value: object = text
        try:
            if isinstance(old, bool):
                value = {"true": True, "false": False}[text.lower()]
            elif isinstance(old, (int, float)):
                value = type(old)(text)
            elif old is None and text.isdigit():
                value = int(text)
        except (ValueError, KeyError):
            raise UserError(f"config_overrides: {item!r} is not of the type of {old!r}") from None
        setattr(config, key, value)
    return config


def check_vocabulary(config: PreTrainedConfig, max_token_id: int, name: str) -> None:
    """Raise UserError if the model has no embedding for `max_token_id`.

    max_token_id: largest token id that occurs in the shards, or that can occur in a text (`tokenizer.max_text_token_id`).
    A tokenizer may have special tokens with larger ids, for which the model has no embeddings (Gemma 3).
    """
    size = text_part.text_config(config).vocab_size
    if size <= max_token_id:
        raise UserError(
            f"{name} has {size} embeddings but token {max_token_id} occurs: "
            "prepare the shards with the model's own tokenizer"
        )


def context_length(config: PreTrainedConfig) -> int:
    """Return the maximum sequence length of the model in tokens; 0 if there is no limit."""
    return getattr(text_part.text_config(config), "max_position_embeddings", 0) or 0


def default_attn_implementation(config: PreTrainedConfig) -> str:
    """Return the attention implementation that transformers chooses for `config`: "sdpa" or "eager"."""
    inner = text_part.text_config(config)
    class_ = text_part.model_class(inner if text_part.has_causal_lm(inner) else config)
    return "sdpa" if library_internals.supports_sdpa(class_) else "eager"


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model on the meta device. No memory is allocated for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers of `model` whose activations the backward pass can recompute (gradient checkpointing)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def num_parameters(config: PreTrainedConfig) -> int:
    """Return the number of parameters of the model. Tied parameters are counted once."""
    return sum(parameter.numel() for parameter in build_on_meta(config).parameters())


def write_random_weights(config: PreTrainedConfig, seed: int, folder: Path) -> None:
    """Initialise a model in fp32 on the CPU from `seed` and save it into `folder`.

    Exactly one process must call this function. Then all processes load `folder`. If each process built the model inside
    `deepspeed.zero.Init`, transformers would compute wrong weights from empty tensors. (GPT-2's first loss was 85, not 9.)
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def load_model(
    name_or_path: str | Path, dtype: str, attention: str | None = None, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """Return the causal LM of a local folder or Hub name with weights in `dtype` ("fp32" | "bf16").

    For a multimodal wrapper, only the text part is loaded. attention: an attention implementation; None: transformers'
    default. config: a result of `load_config`; None: load the config. Under ZeRO-3 (a live HfDeepSpeedConfig), the call is
    collective and each rank keeps its partition. Raises UserError if the model cannot be loaded, if a weight is missing, or
    if a weight has another shape than in the config.
    """
    import torch
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    name, problem = str(name_or_path), None
    model: Any = None
    folder_config = _read_config(name)
    config = config or text_part.causal_lm_config(folder_config, name)
    class_: Any = text_part.model_class(config)
    try:
        with _keep_loaded_rows():
            model, info = class_.from_pretrained(
                name,
                config=config,
                dtype=getattr(torch, TORCH_DTYPE_NAMES[dtype]),  # overrides the dtype in the files
                attn_implementation=attention or default_attn_implementation(config),
                ignore_mismatched_sizes=True,  # _check_weights reports them
                output_loading_info=True,
                key_mapping=text_part.key_mapping(class_) if text_part.is_wrapper(folder_config) else None,
            )
        _check_weights(model, info, name, folder_config)
        if text_part.is_wrapper(folder_config):
            # Otherwise save_pretrained would write the text config, but name the weights as in the wrapper.
            model.__dict__.pop("_weight_conversions", None)
    except UserError as error:
        problem = str(error)
    except Exception as error:  # transformers raises errors of many types for files it cannot read
        if isinstance(error, torch.OutOfMemoryError) or distributed.is_communication_failure(error):
            raise
        traceback.print_exc()
        problem = f"no model at {name} (a local folder or a hub name): {error_reason(error)}"
        # This error is raised after the last collective of from_pretrained. After any other error, other ranks may still be in
        # a collective of from_pretrained, so this rank must not start another collective.
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise UserError(problem) from None
    if is_deepspeed_zero3_enabled():
        # Only rank 0 reads the weights, so `problem` may be None on the other ranks.
        distributed.raise_on_all_ranks(problem)
    elif problem is not None:
        raise UserError(problem)
    assert model is not None
    return model


def _check_weights(
    model: PreTrainedModel, info: dict[str, Any], name: str, folder_config: PreTrainedConfig
) -> None:
    """Raise UserError if a weight is missing or has another shape; log unexpected weights on rank 0.

    info: the loading info of `from_pretrained`. It omits tied weights and weights that the model class computes.
    folder_config: the config in the folder, which may belong to a multimodal wrapper.
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
        instead = f"; its files hold {_some(unexpected)} instead" if unexpected and missing else ""
        raise UserError(
            f"{name}: {' and '.join(problems)}{instead}. transformers would fill them with random numbers: "
            "give a complete model whose config.json matches its weights"
        )
    if text_part.is_wrapper(folder_config):
        terminal.info(
            f"{name} is multimodal ({folder_config.model_type}): its text part ({model.config.model_type}) alone is used and exported"
            + (f"; {_count(unexpected)} of the other parts are left out" if unexpected else "")
        )
    elif unexpected:
        terminal.warning(
            f"{name} holds {_count(unexpected)} the model does not use ({_some(unexpected)}): left out"
        )


def _unexpected_under_zero3(model: PreTrainedModel, name: str) -> set[str]:
    """Return the unexpected weights in folder `name` under ZeRO-3, where transformers reports none; else set()."""
    from transformers.core_model_loading import WeightConverter, rename_source_key
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.utils.loading_report import LoadStateDictInfo

    if not is_deepspeed_zero3_enabled():
        return set()
    conversions = library_internals.weight_conversions(model)
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    renamings = [conversion for conversion in conversions if not isinstance(conversion, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    names = {
        rename_source_key(key, renamings, converters, prefix, state)[0] for key in _names_in_files(Path(name))
    }
    info = LoadStateDictInfo(set(), names - state.keys(), set(), [], {}, set())
    library_internals.leave_out_expected_extras(model, info)
    return info.unexpected_keys


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


def _some(names: Sequence[str]) -> str:
    num_more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {num_more} more" if num_more > 0 else "")


def _count(names: Sequence[str], singular: str = "", plural: str = "") -> str:
    """Return e.g. "1 weight has" or "2 weights have"."""
    return f"1 weight{singular}" if len(names) == 1 else f"{len(names)} weights{plural}"


def _keep_loaded_rows() -> contextlib.AbstractContextManager[None]:
    """Return a context manager in which transformers' `zeros_` leaves views of tensors unchanged.

    transformers 5 does not mark views of loaded tensors as initialised. So it would zero the loaded padding row
    (`weight[padding_idx]`) of some model families (Youtu, RecurrentGemma).
    """
    from transformers import initialization

    original = initialization.zeros_

    def zeros(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if library_internals.is_view(tensor) else original(tensor)

    return library_internals.replaced_attribute(initialization, "zeros_", zeros)


def empty_model(config: PreTrainedConfig, dtype: str, attention: str | None = None) -> PreTrainedModel:
    """Return a model with uninitialised weights and initialised buffers, into which a checkpoint can be loaded."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    torch_dtype = getattr(torch, TORCH_DTYPE_NAMES[dtype])
    with no_init_weights(), _empty_shards():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch_dtype, attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()  # no_init_weights skips this step
    return model


@contextlib.contextmanager
def _empty_shards() -> Iterator[None]:
    """Context manager in which new models are partitioned by ZeRO-3 but not initialised.

    It does nothing unless a live HfDeepSpeedConfig enables ZeRO-3. transformers' own code, which it replaces, would also
    gather and initialise all parameters; that would take half of the time in which the engine is built.
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


@contextlib.contextmanager
def data_in_dtypes(tensors: Sequence[tuple[torch.Tensor, torch.dtype]]) -> Iterator[None]:
    """Context manager in which the data of each tensor is converted to the dtype beside it. On exit, the data is restored."""
    before = [(tensor, tensor.data) for tensor, _ in tensors]
    try:
        for tensor, dtype in tensors:
            tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def local_device() -> torch.device:
    """Return the GPU that `distributed.initialize` selected for this rank, or the CPU if there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
