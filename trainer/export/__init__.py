"""DeepSpeed ZeRO checkpoints -> Hugging Face folders, by streaming byte ranges."""
