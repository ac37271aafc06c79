"""Checks of a machine or a Slurm allocation before training; the entry point is run_checks.py."""
