"""Let a teacher model write the steps of problems: python tools/annotate.py --data svamp --base_url URL --model NAME ..."""

from trainer.commands.main import run_command

if __name__ == "__main__":
    run_command("annotate")
