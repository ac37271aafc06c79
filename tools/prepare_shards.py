"""Tokenize problems once, for all methods: python tools/prepare_shards.py --data gsm8k ..."""

from trainer.commands.main import run_command

if __name__ == "__main__":
    run_command("prepare_shards")
