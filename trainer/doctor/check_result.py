"""Result of one check."""

from __future__ import annotations

from dataclasses import dataclass

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


def ok_if(
    condition: bool, group: str, name: str, detail: str, remedy: str, otherwise: str = WARN
) -> CheckResult:
    """Return an ok result without the remedy if `condition`, else one with the status `otherwise`."""
    return CheckResult(group, name, OK if condition else otherwise, detail, "" if condition else remedy)
