"""Tokenised problems on disk, memory-mapped; a training method is a view of them."""
