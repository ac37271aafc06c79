"""Tokenize problems once, for all methods: python tools/prepare_shards.py --data gsm8k ..."""

from trainer.commands.prepare_shards import main

if __name__ == "__main__":
    main()
