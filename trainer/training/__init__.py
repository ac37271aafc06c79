"""Training of one model: shards -> packs -> steps -> checkpoints. The entry point is loop.py."""
