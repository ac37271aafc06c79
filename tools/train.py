"""Train one model with DeepSpeed: deepspeed --num_gpus 2 tools/train.py --config FILE (or with mpiexec, srun, python)."""

from trainer.commands.train import main

if __name__ == "__main__":
    main()
