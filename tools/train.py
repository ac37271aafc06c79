"""Train one model with DeepSpeed: deepspeed --num_gpus 2 tools/train.py --config FILE (or with mpiexec, srun, python)."""

from trainer.commands.main import run_command

if __name__ == "__main__":
    run_command("train")
