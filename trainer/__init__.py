"""Socratic Trainer: distil step-by-step reasoning into small language models with DeepSpeed ZeRO.

The data pass through the folders problems -> shards -> models, training -> export -> evaluation -> report. The folder
`study` runs all these steps. See README.md.
"""

__version__ = "0.1.0"
