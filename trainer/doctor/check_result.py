"""Result of one check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class CheckResult:
    """Result of one check. `status`: ok, warn or fail. `remedy`: what to do, empty if ok."""

    group: str
    name: str
    status: str
    detail: str
    remedy: str = ""
    host: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
