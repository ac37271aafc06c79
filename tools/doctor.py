"""Check that this machine, or every node of a job, can train: python tools/doctor.py (also srun, mpiexec, deepspeed)."""

from trainer.commands.doctor import main

if __name__ == "__main__":
    main()
