"""Settings of small models, by model type, that the rules of small_configs.py cannot derive."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BY_KIND = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_BOTH = ["sliding_attention", "full_attention"]
_MAMBA = ["linear_attention", "full_attention"]

OVERRIDES: dict[str, dict[str, Any]] = {
    # Hybrids whose default has one kind of layer, or too many layers to the next kind.
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 2},
    "granitemoehybrid": {"layer_types": _MAMBA, "num_hidden_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    # Windows and sparse attention that the published default has off.
    "cohere_compass_text": {"layer_types": _BOTH, "num_hidden_layers": 2, "rope_parameters": _BY_KIND},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_hidden_layers": 2,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    # Soft caps: the published 50 shows only with trained weights.
    "gemma2": {"attn_logit_softcapping": 5.0},
    "vaultgemma": {"attn_logit_softcapping": 5.0},
    # Experts that are off by default, or whose number a class restricts.
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "zaya": {"num_experts_per_tok": 1},
    # Sizes that depend on each other.
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_hidden_layers": 2,
        "head_dim": 24,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 12,
        "sliding_window": 512,
    },
    "dots3_note_audio_encoder": {
        "adapter_out_dim": 64,
        "adapter_input_size": 32,
        "downsample_hidden_size": 16,
    },
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 32,
        "adapter_out_dim": 64,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "gemma3n_text": {
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
        "intermediate_size": 96,
        "layer_types": _BOTH * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
    },
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "mamba2": {"num_heads": 8},
    "rwkv": {"attention_hidden_size": 64},
    "xlstm": {"embedding_dim": 128, "hidden_size": 128},  # its sizes are rounded up to multiples of 64
    # Wrappers.
    "emu3": {"vocabulary_map": {"<image>": 490, "<|extra_200|>": 491, "<|visual token 000000|>": 492}},
    "fuyu": {"image_size": 28, "patch_size": 14},
}
