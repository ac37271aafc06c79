"""Process-level services: distributed environment, directory locks, signals, restarts and terminal output."""
