"""Evaluation on held-out problems: decoding backends, solving programs, work queue, scoring."""
