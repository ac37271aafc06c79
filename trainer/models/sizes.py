"""Model shapes by name, for students with random weights.

The *stories* sizes are Llama-shaped (rotary positions, gated MLP, tied embeddings): the shape of today's small
models, and rotary positions learn to copy a number much sooner than learned ones.
"""

from __future__ import annotations

from typing import Any

# name -> (layers, width, heads, width of the gated MLP)
_STORIES = {
    "stories-0.2m": (2, 64, 4, 192),
    "stories-1m": (4, 128, 4, 384),
    "stories-2m": (4, 192, 6, 512),
}


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
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
