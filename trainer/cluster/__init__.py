"""Run a study as Slurm jobs: batch scripts, submission and status."""
