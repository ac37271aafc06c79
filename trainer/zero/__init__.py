"""Reading of DeepSpeed's checkpoint files as named byte ranges, for export and for resuming a run."""
