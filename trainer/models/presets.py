"""Model shapes by name: small students with random weights, and published models for planning without internet access.

Students are Llama models (rotary positions, gated MLP, tied embeddings). With rotary positions and heads of 16 dimensions, a
model learns to copy numbers much sooner than with learned positions and heads of 32 dimensions. A rotary base of 500 fits
short texts. Random weights have a standard deviation of 1 / sqrt(width): with transformers' default of 0.02, a narrow model
starts to learn much later. Up to 0.4m, students have two layers, because a second layer is enough to copy numbers and more
steps help more than more layers in the same time. Heads of 16 dimensions are slow on a GPU, so larger students have heads of
32 (10m, 30m) or 64 dimensions.
"""

from typing import Any

# name -> (number of layers, model width, number of heads, width of the gated MLP)
_STUDENTS = {
    "stories-0.01m": (2, 16, 1, 40),
    "stories-0.03m": (2, 24, 2, 64),
    "stories-0.08m": (2, 48, 3, 128),
    "stories-0.2m": (2, 80, 5, 200),
    "stories-0.4m": (2, 128, 8, 288),
    "stories-0.7m": (3, 128, 8, 352),
    "stories-1m": (4, 144, 9, 384),
    "stories-3m": (6, 192, 12, 512),
    "stories-10m": (8, 320, 10, 864),
    "stories-30m": (10, 512, 16, 1376),
    "stories-100m": (14, 768, 12, 2048),
    "stories-300m": (24, 1024, 16, 2752),
}


def student_names() -> list[str]:
    return list(_STUDENTS)


def student_config(name: str, vocabulary_size: int) -> Any:
    """Return the transformers config of a student shape for a vocabulary of `vocabulary_size` tokens."""
    from transformers import LlamaConfig

    layers, width, heads, mlp_width = _STUDENTS[name]
    settings = _llama(layers, width, heads, heads, mlp_width, vocabulary_size, tied=True)
    settings["max_position_embeddings"] = 1024
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    settings["initializer_range"] = width**-0.5
    return LlamaConfig(**settings, bos_token_id=None, eos_token_id=None)


def _neox(layers: int, width: int, heads: int, vocabulary: int = 50304) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }


def _llama(
    layers: int, width: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, tied: bool = False
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": tied,
    }


# name -> (transformers' model type, settings)
_PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_layer": 12, "n_embd": 768, "n_head": 12}),
    "gpt2-medium": ("gpt2", {"n_layer": 24, "n_embd": 1024, "n_head": 16}),
    "gpt2-large": ("gpt2", {"n_layer": 36, "n_embd": 1280, "n_head": 20}),
    "gpt2-xl": ("gpt2", {"n_layer": 48, "n_embd": 1600, "n_head": 25}),
    "pythia-160m": ("gpt_neox", _neox(12, 768, 12)),
    "pythia-410m": ("gpt_neox", _neox(24, 1024, 16)),
    "pythia-1.4b": ("gpt_neox", _neox(24, 2048, 16)),
    "pythia-6.9b": ("gpt_neox", _neox(32, 4096, 32, 50432)),
    "llama-2-7b": ("llama", _llama(32, 4096, 32, 32, 11008, 32000)),
    "llama-2-13b": ("llama", _llama(40, 5120, 40, 40, 13824, 32000)),
    "llama-2-70b": ("llama", _llama(80, 8192, 64, 8, 28672, 32000)),
    "llama-3.1-8b": ("llama", _llama(32, 4096, 32, 8, 14336, 128256)),
    "llama-3.2-1b": ("llama", {**_llama(16, 2048, 32, 8, 8192, 128256, tied=True), "head_dim": 64}),
    "mistral-7b": ("mistral", {**_llama(32, 4096, 32, 8, 14336, 32000), "sliding_window": None}),
    "qwen2.5-0.5b": ("qwen2", _llama(24, 896, 14, 2, 4864, 151936, tied=True)),
    "qwen2.5-1.5b": ("qwen2", _llama(28, 1536, 12, 2, 8960, 151936, tied=True)),
    "qwen2.5-3b": ("qwen2", _llama(36, 2048, 16, 2, 11008, 151936, tied=True)),
    "qwen2.5-7b": ("qwen2", _llama(28, 3584, 28, 4, 18944, 152064)),
    "qwen2.5-14b": ("qwen2", _llama(48, 5120, 40, 8, 13824, 152064)),
    "qwen3-0.6b": ("qwen3", {**_llama(28, 1024, 16, 8, 3072, 151936, tied=True), "head_dim": 128}),
    "qwen3-8b": ("qwen3", {**_llama(36, 4096, 32, 8, 12288, 151936), "head_dim": 128}),
}


def published_names() -> list[str]:
    return list(_PUBLISHED)


def published_config(name: str) -> Any:
    """Return the transformers config of a published model. Settings not in `_PUBLISHED` have transformers' defaults."""
    from transformers import AutoConfig

    model_type, settings = _PUBLISHED[name]
    return AutoConfig.for_model(model_type, **settings)
