"""The `socratic` command: one module for each sub-command, and their common command line parser."""
