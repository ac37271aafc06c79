"""Generate and score answers: deepspeed --num_gpus 2 tools/evaluate.py ... --shards DIR (or with mpiexec, srun, python)."""

from trainer.commands.evaluate import main

if __name__ == "__main__":
    main()
