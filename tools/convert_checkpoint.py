"""Convert a ZeRO checkpoint to a Hugging Face folder: python tools/convert_checkpoint.py RUN"""

from trainer.commands.convert_checkpoint import main

if __name__ == "__main__":
    main()
