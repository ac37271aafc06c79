"""Model shapes by name, for students with random weights.

The *stories* shapes are Llama's (rotary positions, gated MLP, tied embeddings), small: rotary positions learn to copy
a number much sooner than learned ones, heads of 16 sooner than heads of 32, and a base of 500 fits short texts. From
10m on heads grow with the width as usual (32, then 64): those sizes are for a GPU, where heads of 16 are slow.
"""

from __future__ import annotations

from typing import Any

# name -> (layers, width, heads, width of the gated MLP)
_STORIES = {
    "stories-0.2m": (2, 64, 4, 160),
    "stories-0.7m": (3, 128, 8, 320),
    "stories-1m": (4, 144, 9, 384),
    "stories-3m": (6, 192, 12, 512),
    "stories-10m": (8, 320, 10, 864),
    "stories-30m": (10, 512, 16, 1376),
    "stories-100m": (14, 768, 12, 2048),
    "stories-300m": (24, 1024, 16, 2752),
}
_ROTARY_BASE = 500.0


def names() -> list[str]:
    return list(_STORIES)


def config(name: str, vocabulary_size: int) -> Any:
    """The transformers config of a named shape, for a vocabulary of that many tokens."""
    from transformers import LlamaConfig

    layers, width, heads, mlp_width = _STORIES[name]
    return LlamaConfig(
        vocab_size=vocabulary_size,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=mlp_width,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": _ROTARY_BASE},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
