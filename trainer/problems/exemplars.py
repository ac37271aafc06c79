from trainer.problems.sources import read_exemplars

__all__ = ["read_exemplars"]
