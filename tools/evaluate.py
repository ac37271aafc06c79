"""Generate and score answers: deepspeed --num_gpus 2 tools/evaluate.py ... --shards DIR (or with mpiexec, srun, python)."""

from trainer.commands.main import run_command

if __name__ == "__main__":
    run_command("evaluate")
