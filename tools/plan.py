"""Estimate memory, disk and time of a run: python tools/plan.py --model_name_or_path gpt2-xl --gpu a100-80gb ..."""

from trainer.commands.main import run_command

if __name__ == "__main__":
    run_command("plan")
