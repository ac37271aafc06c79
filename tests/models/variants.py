"""Variants of model families that a default configuration does not cover: name -> (model type, settings)."""

from __future__ import annotations

from typing import Any

# Settings that limit the keys of a query, and the suffix of the row in which they are shorter than the examples.
WINDOWS = {
    "sliding_window": "window",
    "sliding_window_size": "window",
    "window_size": "window",
    "attention_window_size": "window",
    "local_attention": "window",
    "attention_chunk_size": "chunk",
}

_WINDOW = 16
_BOTH = ["sliding_attention", "full_attention"]
_SHARED = {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": _BOTH * 2}
_PHI4 = {"partial_rotary_factor": 0.75, "tie_word_embeddings": True, "max_position_embeddings": 512}


def _yarn(original: int) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": original,
    }


def _longrope(original: int) -> dict[str, Any]:
    """Return Phi-4-mini's rotary settings for heads of 16, of which three quarters rotate."""
    return {
        **_PHI4,
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 2.0, 4.0, 6.0, 8.0, 10.0],
            "original_max_position_embeddings": original,
        },
    }


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # Positions.
    "deepseek_v3-yarn": ("deepseek_v3", {"rope_parameters": _yarn(64)}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "llama-3.2": ("llama", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "mpt-no-alibi": ("mpt", {"attn_config": {"alibi": False}}),
    "phi4-mini": ("phi3", _longrope(256)),
    "phi4-mini-long": ("phi3", _longrope(32)),
    "qwen3-yarn": ("qwen3", {"rope_parameters": _yarn(32)}),
    # Heads.
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_bigcode-mha": ("gpt_bigcode", {"multi_query": False}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "qwen3-wide-heads": ("qwen3", {"head_dim": 32}),
    "deepseek_v3-equal-heads": ("deepseek_v3", {"v_head_dim": 24}),
    "deepseek_v3-no-q-lora": ("deepseek_v3", {"q_lora_rank": None}),
    # Ties and biases.
    "gpt_neox-tied": ("gpt_neox", {"tie_word_embeddings": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-tied": ("mistral", {"tie_word_embeddings": True}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2-untied": ("gemma2", {"tie_word_embeddings": False}),
    # Blocks.
    "gpt2-mistral": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "opt-350m": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "stablelm-2": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True}),
    # Dropout, which must be off in evaluation mode.
    "gpt2-dropout": ("gpt2", {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}),
    "llama-dropout": ("llama", {"attention_dropout": 0.2}),
    # Windows that are off by default.
    "ministral-window": ("ministral", {"sliding_window": _WINDOW}),
    "mistral-window": ("mistral", {"sliding_window": _WINDOW}),
    "mixtral-window": ("mixtral", {"sliding_window": _WINDOW}),
    "laguna-window": ("laguna", {"sliding_window": _WINDOW, "layer_types": _BOTH}),
    "phi3-window": ("phi3", {"sliding_window": _WINDOW}),
    "phimoe-window": ("phimoe", {"sliding_window": _WINDOW}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1}),
    "qwen2_moe-window": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1}),
    "qwen3_moe-window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1}),
    "smollm3-window": ("smollm3", {"use_sliding_window": True, "sliding_window": _WINDOW, "layer_types": _BOTH}),
    "starcoder2-window": ("starcoder2", {"sliding_window": _WINDOW}),
    "zaya-window": ("zaya", {"sliding_window": _WINDOW, "layer_types": ["hybrid", "hybrid_sliding"]}),
    # Soft caps.
    "gemma3-caps": ("gemma3_text", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0}),
    "gemma4-caps": ("gemma4_text", {"final_logit_softcapping": 5.0}),
    # Shared key-value layers; Gemma 4 E2B and E4B.
    "gemma4-shared": ("gemma4_text", _SHARED),
    "gemma4-shared-window": ("gemma4_text", {**_SHARED, "sliding_window": _WINDOW}),
    "gemma4-e2b": ("gemma4", {"text_config": _SHARED}),
    "gemma4-moe": ("gemma4_text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}),
    "gemma4-k-eq-v": ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    # Experts.
    "qwen2_moe-mixed": ("qwen2_moe", {"mlp_only_layers": [0]}),
    "qwen3_moe-mixed": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "mixtral-one": ("mixtral", {"num_experts_per_tok": 1}),
    "llama4-dense": ("llama4_text", {"moe_layers": []}),
    # Published hybrids.
    "granite-4-micro": ("granitemoehybrid", {"layer_types": ["full_attention"] * 2, "num_local_experts": 0}),
    "granite-4-h-dense": ("granitemoehybrid", {"num_local_experts": 0}),
    "jamba-dense": ("jamba", {"num_experts": 1}),
    "lfm2-many": ("lfm2", {"layer_types": ["conv", "conv", "full_attention"] * 2, "num_hidden_layers": 6}),
    "qwen3_5-deep": ("qwen3_5_text", {"layer_types": [*["linear_attention"] * 3, "full_attention"], "num_hidden_layers": 4}),
    # Wrappers around a text model.
    "gemma3-4b-window": ("gemma3", {"text_config": {"sliding_window": _WINDOW}}),
    "mistral3": ("mistral3", {}),
}  # fmt: skip
