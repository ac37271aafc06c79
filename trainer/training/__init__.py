"""Train one student: shards -> packs -> steps -> checkpoints. Start reading at loop.py."""
