"""Evaluation on held-out problems: decoding backends, programs that control decoding, work queue and scoring."""
