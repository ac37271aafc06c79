"""Socratic Trainer: distil step-by-step reasoning into small language models with DeepSpeed ZeRO.

A folder is a stage, in the order of the data: problems -> shards -> models, training -> export -> evaluation ->
report; `study` runs them all. See README.md.
"""

__version__ = "0.1.0"
