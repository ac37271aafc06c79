"""Check that this machine, or every node of a job, can train: python tools/doctor.py (or with srun, mpiexec, deepspeed)."""

from trainer.commands.main import run_command

if __name__ == "__main__":
    run_command("doctor")
