"""Shrink the configuration of any model family to a model of a few thousand parameters.

The rules depend on names of settings only, so that a family of a new release needs no entry. Layers are chosen from the
published default so that every kind of layer occurs at least once. overrides.py has the exceptions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.models.overrides import OVERRIDES

VOCABULARY = 500
LONG = 512  # positions, windows and chunks of a base row: longer than any example of the tests
MAX_LAYERS = 6

# Names of the setting for the number of layers.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    # Width.
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "embedding_dim": 64, "word_embed_proj_dim": 64, "emb_dim": 64,
    "lru_width": 64, "attention_hidden_size": 128, "router_hidden_size": 16, "hidden_size_per_layer_input": 8,
    # Feed-forward layers.
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "ffn_hidden_size": 96, "dff": 96, "dim_ff": 96,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "shared_intermediate_size": 48,
    "intermediate_size_mlp": 96, "expert_ffn_hidden_size": 48, "dense_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 48, "shared_experts_intermediate_size": 48, "block_multiple_of": 16, "d_inner": 96, "d_head": 16,
    "laurel_rank": 8, "adapter_rank": 8, "ffn_round_up_to_multiple_of": 16,
    # Attention.
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 16, "kv_channels": 16, "dim_head": 16, "rotary_dim": 8,
    "num_query_groups": 2, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
    "num_global_key_value_heads": 2, "global_head_dim": 32,
    "query_pre_attn_scalar": 16, "attention_head_dim": 32, "d_rel": 8, "rel_extent": 64,
    # Multi-head latent attention: values smaller than keys, as published.
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "qk_head_dim": 24,
    "v_head_dim": 12, "o_lora_rank": 16, "o_groups": 2, "gated_norm_rank": 8,
    # Sparse attention.
    "index_head_dim": 16, "index_n_heads": 2, "index_topk": 8, "index_block_size": 8, "index_topk_blocks": 2,
    "index_local_blocks": 1, "keep_window_size": 8,
    # Positions and windows.
    "max_position_embeddings": LONG, "n_positions": LONG, "n_ctx": LONG, "max_seq_len": LONG,
    "model_max_length": LONG, "context_length": LONG, "sliding_window": LONG, "window_size": LONG,
    "attention_window_size": LONG, "local_attention": LONG, "attention_chunk_size": LONG, "sliding_window_size": LONG,
    # Experts.
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "zero_expert_num": 2,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 1,
    "decoder_sparse_step": 1, "hc_lowrank": 8, "hc_count": 2, "hc_mult": 2,
    # State space, linear attention and convolution.
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_num_heads": 8,
    "mamba_head_dim": 16, "mamba_headdim": 16, "mamba_chunk_size": 16, "chunk_size": 16, "state_size": 8,
    "ssm_state_size": 8, "time_step_rank": 8, "mamba_dt_rank": 8, "n_groups": 2, "n_mamba_heads": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_head_dim": 16, "linear_num_heads": 4, "block_size": 16,
    # Extra predictions of later tokens are no part of the loss.
    "num_nextn_predict_layers": 0,
}  # fmt: skip

# Multi-head latent attention has no groups of heads, and its `head_dim` is that of the rotary part.
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}

# No token ends a text, so that every text has the requested length; prompts have no `pad` token.
_TOKENS = {
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "sep_token_id": None,
    "cls_token_id": None,
}

# Random weights of this deviation give logits that differ between tokens, with the residual stream still in range.
_INITIALISER = {"initializer_range": 0.15, "init_std": 0.15, "embed_init_std": 0.15}

# Settings that are given even if the published default derives them from others.
_DERIVED = ("head_dim", "num_key_value_heads", "qk_head_dim", "v_head_dim")

# Sizes of the submodels of a wrapper that are no text model.
_ENCODERS: dict[str, Any] = {
    "depth": 2, "num_hidden_layers": 2, "num_layers": 2, "num_blocks": 2, "encoder_layers": 2, "num_global_layers": 1,
    "hidden_size": 32, "d_model": 32, "embed_dim": 32, "intermediate_size": 32, "mlp_dim": 32, "encoder_ffn_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_heads": 2, "encoder_attention_heads": 2, "head_dim": 16,
    "image_size": 28, "crop_size": 28, "patch_size": 14, "output_channels": 32, "position_embedding_size": 64,
    "num_position_embeddings": 16, "moe_intermediate_size": 32, "num_local_experts": 2, "audio_embed_dim": 32,
    "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32, "codebook_size": 16,
    "num_embeddings": 16, "base_channels": 32, "output_proj_dims": 32,
    "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "out_hidden_size": 64,
}  # fmt: skip


def small(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Return a small config of `model_type`; `changes` are settings that override every rule."""
    return CONFIG_MAPPING[model_type](**settings(CONFIG_MAPPING[model_type], changes))


def settings(
    config_class: type[PreTrainedConfig], changes: dict[str, Any], is_text: bool = True
) -> dict[str, Any]:
    """Return the arguments for a small config of `config_class`; `is_text`: it is a text model or a wrapper around one."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(config_class)}
    overrides = OVERRIDES.get(config_class.model_type, {})
    default = config_class()
    aliases = config_class.attribute_map
    published = {name: vars(default).get(aliases.get(name, name)) for name in fields}
    sizes = _SIZES | _INITIALISER if is_text else _ENCODERS | {"initializer_range": 0.15}
    # A setting that is off stays off.
    chosen = {
        name: value
        for name, value in sizes.items()
        if name in fields
        and (_is_on(published.get(name)) or (name in _DERIVED and published.get(name) is None))
    }
    chosen |= {name: _token(value, fields[name]) for name, value in _TOKENS.items() if name in fields}
    if is_text:
        chosen |= _layers(published, fields)
    if "kv_lora_rank" in chosen:
        chosen |= {name: value for name, value in _LATENT.items() if name in chosen}
    sub_configs = {}
    for name, declared in config_class.sub_configs.items():
        if name in fields and published.get(name) is not None and name not in overrides:
            sub_class = declared if dataclasses.is_dataclass(declared) else type(published[name])
            if sub_class.__name__ != "AutoConfig":
                sub_configs[name] = settings(sub_class, dict(changes.get(name, {})), name == "text_config")
                if declared.__name__ == "AutoConfig":
                    sub_configs[name]["model_type"] = sub_class.model_type
    return chosen | overrides | changes | sub_configs


def _is_on(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _token(value: int | None, declared: str) -> int:
    return value if value is not None or "None" in declared else 1  # type: ignore[return-value]


def _layers(published: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the number of layers and every list with one entry per layer, reduced to layers of every kind."""
    name = next((name for name in _LAYERS if name in names), None)
    if name is None:
        return {}
    number = published[name]
    lists = {
        key: value
        for key, value in published.items()
        if key in names and isinstance(value, list) and len(value) == number and number > 1
    }
    if not lists:
        return {name: 2}
    kinds = [repr(kind) for kind in zip(*lists.values(), strict=True)]
    layers = sorted(kinds.index(kind) for kind in set(kinds))[:MAX_LAYERS]
    if len(layers) == 1:
        layers = [layers[0], layers[0]]
    return {name: len(layers), **{key: [value[layer] for layer in layers] for key, value in lists.items()}}
