"""Exit statuses of the tools."""

EXIT_FAILURE = 1  # unexpected error; the traceback is in the log
EXIT_USER_ERROR = 2  # UserError
EXIT_REQUEUE = 75  # stopped on request, or a rank hung; rerun the command to resume (EX_TEMPFAIL)
EXIT_PEER_LOST = 76  # communication with another rank failed
EXIT_INTERRUPTED = 130  # Ctrl-C
