"""Atomic directories, the layout of run directories, and settings read from YAML or flags."""
