"""Locate the tensors in DeepSpeed's checkpoint files by name, and read their bytes, to export a model or resume a run."""
