"""UserError, the exception for mistakes that the user can correct."""


class UserError(Exception):
    """An error that the user can correct; the message names the fault, its location (file, line, value) and the remedy.

    The tools print the message without a traceback and exit with status 2. Any other exception is a bug, and the tools
    print its traceback.
    """


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its class name if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
