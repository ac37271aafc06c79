"""Socratic Trainer: distil step-by-step reasoning into small language models with DeepSpeed ZeRO.

The main subpackages, in the order of use: problems, shards, training, export, evaluation, report. The subpackage `study`
runs all these steps. See README.md.
"""

__version__ = "0.1.0"
