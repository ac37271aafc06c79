"""The optional packages, and the error for a command that needs them."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from trainer.errors import UserError

# Names to import, by extra of pyproject.toml. tests/test_packaging.py compares the two.
EXTRAS = {
    "report": ("pandas", "scipy", "statsmodels", "matplotlib", "jinja2", "sacrebleu"),
    "teacher": ("openai", "jinja2"),
}


def require_extra(extra: str) -> None:
    """Raise UserError if a package of the extra is not installed. Imports nothing."""
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(_message(extra, missing))


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Context manager that turns a failed import of one of the extra's packages into a UserError with the remedy."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in EXTRAS[extra]:
            raise
        raise UserError(_message(extra, [name])) from None


def _message(extra: str, missing: list[str]) -> str:
    verb = "is" if len(missing) == 1 else "are"
    return f'{", ".join(missing)} {verb} not installed; run: pip install "socratic-trainer[{extra}]"'
