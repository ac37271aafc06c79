"""Estimates of memory, disk and time of a training run before it starts; the entry point is plan.py."""
