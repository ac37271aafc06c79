"""The `socratic` command: one module for each sub-command, and the command line parser they share."""
