"""Check that the optional packages of a command are installed."""

import contextlib
import importlib.util
from collections.abc import Iterator

from trainer.errors import UserError

# Extra of pyproject.toml -> importable names of its packages. tests/test_packaging.py compares EXTRAS with pyproject.toml.
EXTRAS = {
    "report": ("pandas", "scipy", "statsmodels", "matplotlib", "jinja2", "sacrebleu"),
    "teacher": ("openai", "jinja2"),
}


def require_extra(extra: str) -> None:
    """Raise UserError if a package of `extra`, a key of EXTRAS, is not installed. The packages are not imported."""
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(_message(extra, missing))


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Context manager for imports. Raises UserError with the pip command if a package of `extra` is not installed."""
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
