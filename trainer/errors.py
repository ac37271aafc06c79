"""UserError, the exception for mistakes that the user can correct."""


class UserError(Exception):
    """An error that the user can correct; the message names the fault, its location (file, line, value) and the remedy.

    The tools print the message without a traceback and exit with status 2. For most other exceptions, the tools also print
    a traceback.
    """


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or the exception's class name if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
