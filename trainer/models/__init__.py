"""Causal language models and tokenizers, made from a preset or loaded from a folder or the Hub."""
