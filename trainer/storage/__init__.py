"""Atomic directories, the layout of run directories, JSON Lines, and settings read from YAML or flags."""
