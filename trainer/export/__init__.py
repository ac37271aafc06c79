"""Export DeepSpeed ZeRO checkpoints as Hugging Face folders, by streaming byte ranges."""
