"""Tokenised problems on disk, memory-mapped. A training method is a view of these problems."""
