"""Result of one check, and the possible statuses."""

from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class CheckResult:
    """Result of the check `name` of `group`. `host`: machines with this result, or "" for all machines."""

    group: str
    name: str
    status: str  # OK, WARN or FAIL
    detail: str
    remedy: str = ""  # empty if ok
    host: str = ""


def ok_if(is_ok: bool, group: str, name: str, detail: str, remedy: str, otherwise: str = WARN) -> CheckResult:
    """Return an ok result without a remedy if `is_ok`, else a result with the status `otherwise`."""
    return CheckResult(group, name, OK if is_ok else otherwise, detail, "" if is_ok else remedy)
