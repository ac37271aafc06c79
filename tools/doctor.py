"""Check that this machine, or every node of a job, can train: python tools/doctor.py (or with srun, mpiexec, deepspeed)."""

from trainer.commands.doctor import main

if __name__ == "__main__":
    main()
