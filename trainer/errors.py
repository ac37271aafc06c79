"""The one exception a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: the message says what, where (file, line, value) and the remedy.

    The tools print it as one message without a traceback and exit with status 2. Anything else that escapes is a
    fault of ours and keeps its traceback.
    """


def first_line(error: Exception) -> str:
    """Return an exception as one line of text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
