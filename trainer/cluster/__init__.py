"""A study as Slurm jobs: batch scripts, submitting them, and what became of them."""
