"""Make figures, tables and one self-contained page from run directories. Needs the extra "report", but not torch."""

from importlib.util import find_spec

from trainer.errors import UserError

_MISSING = [name for name in ("pandas", "scipy", "statsmodels") if find_spec(name) is None]
if _MISSING:
    raise UserError(f"the report needs {', '.join(_MISSING)}: pip install 'socratic-trainer[report]'")
