"""DeepSpeed's checkpoint files as named byte ranges: what export streams out and training streams back in."""
