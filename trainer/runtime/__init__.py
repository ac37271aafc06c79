"""A process: its launcher, its ranks, its lock, its signals, and its output on the terminal."""
