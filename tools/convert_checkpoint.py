"""Convert a ZeRO checkpoint to a Hugging Face folder: python tools/convert_checkpoint.py RUN"""

from trainer.commands.main import run_command

if __name__ == "__main__":
    run_command("convert_checkpoint")
