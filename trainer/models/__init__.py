"""Causal language models and tokenizers: made or loaded, by name, folder or hub name."""
