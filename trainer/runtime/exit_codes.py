"""Exit statuses of the tools."""

from __future__ import annotations

EXIT_FAILURE = 1  # an unexpected error; its traceback is in the log
EXIT_USER_ERROR = 2  # a UserError: the message names the remedy
EXIT_REQUEUE = 75  # asked to stop, or hung; the same command resumes (EX_TEMPFAIL of sysexits.h)
EXIT_PEER_LOST = 76  # a rank that cannot continue because another rank is gone
EXIT_INTERRUPTED = 130  # Ctrl-C
