"""Run every check, on this machine or on every machine of a launched job, and tell what was found."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

from trainer.doctor import machine, rank_checks, software
from trainer.doctor.check_result import FAIL, OK, WARN, CheckResult
from trainer.errors import UserError
from trainer.runtime import distributed, process_group, terminal
from trainer.settings import DoctorSettings
from trainer.storage.configuration import did_you_mean

_RANKS = 2
_RANKS_TIMEOUT_SECONDS = 600
_LOCAL: dict[str, Callable[[DoctorSettings], list[CheckResult]]] = {
    "versions": lambda settings: software.versions(settings.known_good),
    "compiler": lambda settings: [software.compiler(), *software.unfinished_builds()],
    "mpi": lambda settings: [software.mpi()],
    "slurm": lambda settings: software.slurm(),
    "disk": lambda settings: machine.disk(settings.output_dir, settings.min_free_gb),
    "memory": lambda settings: [machine.shared_memory()],
    "cpu": lambda settings: [machine.processor()],
    "gpu": lambda settings: [machine.accelerators()],
}
GROUPS = (*_LOCAL, *rank_checks.GROUPS)


def run_checks(settings: DoctorSettings) -> list[CheckResult]:
    """All findings. Under a launcher the ranks that are there check each other and each machine itself; else two are started.

    Collective under a launcher: every rank returns the same. Raises UserError for an unknown group.
    """
    for group in settings.skip:
        if group not in GROUPS:
            raise UserError(
                f"skip: there is no group {group!r}; known: {', '.join(GROUPS)}{did_you_mean(group, GROUPS)}"
            )
    wanted = [group for group in rank_checks.GROUPS if group not in settings.skip]
    world = distributed.environment_from_launcher(os.environ)
    if world.world_size == 1:
        return [*_local(settings), *_started(wanted)]
    distributed.initialize(timeout_seconds=_RANKS_TIMEOUT_SECONDS)
    own = _local(settings) if world.local_rank == 0 else []
    host = socket.gethostname()
    everybody = distributed.gather_objects([replace(finding, host=host) for finding in own])
    found = [finding for findings in everybody for finding in findings]
    num_machines = sum(1 for findings in everybody if findings)
    if num_machines > 1:
        found = _merge(found, num_machines)
    return [*found, *rank_checks.check_ranks(wanted)]


def print_report(findings: list[CheckResult], seconds: float, as_json: bool) -> bool:
    """Print one line a finding (rank 0); returns whether nothing failed."""
    failed = sum(finding.status == FAIL for finding in findings)
    warned = sum(finding.status == WARN for finding in findings)
    if as_json:
        result = {
            "ok": not failed,
            "seconds": seconds,
            "findings": [finding.as_dict() for finding in findings],
        }
        terminal.info(json.dumps(result, indent=1))
        return not failed
    for finding in findings:
        where = f" [{finding.host}]" if finding.host else ""
        terminal.info(f"{finding.status:<4}  {finding.group}: {finding.name}{where}: {finding.detail}")
        if finding.remedy:
            terminal.info(f"      -> {finding.remedy}")
    terminal.info(f"{len(findings)} checks in {seconds:.0f} s: {failed} failed, {warned} warning(s)")
    return not failed


def _local(settings: DoctorSettings) -> list[CheckResult]:
    found: list[CheckResult] = []
    for group, check in _LOCAL.items():
        if group not in settings.skip:
            found += check(settings)
    return found


def _merge(findings: list[CheckResult], num_machines: int) -> list[CheckResult]:
    """What is ok is told once, and with its machines only if it is not ok on all; what is not, with its machines."""
    merged: dict[tuple[str, str, str], CheckResult] = {}
    hosts: dict[tuple[str, str, str], list[str]] = {}
    for finding in findings:
        text = finding.status if finding.status == OK else finding.detail
        key = (finding.group, finding.name, text)
        merged.setdefault(key, finding)
        hosts.setdefault(key, []).append(finding.host)

    def named(key: tuple[str, str, str]) -> str:
        everywhere = len(hosts[key]) == num_machines and merged[key].status == OK
        return "" if everywhere else ", ".join(dict.fromkeys(hosts[key]))

    return [replace(finding, host=named(key)) for key, finding in merged.items()]


def _started(groups: list[str]) -> list[CheckResult]:
    """Start two ranks here for what needs several."""
    if not groups:
        return []
    port = str(process_group.free_port())
    processes = []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        for rank in range(_RANKS):
            ours = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(_RANKS)}
            ours |= {"LOCAL_WORLD_SIZE": str(_RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "trainer.doctor.rank_checks", *groups],
                    env={**distributed.without_launcher_variables(os.environ), **ours},
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=log,
                    text=True,
                )
            )
        return _collect(processes, log, groups)


def _collect(processes: list[subprocess.Popen[str]], log: object, groups: list[str]) -> list[CheckResult]:
    deadline = time.monotonic() + _RANKS_TIMEOUT_SECONDS
    try:
        output, _ = processes[0].communicate(timeout=_RANKS_TIMEOUT_SECONDS)
        for process in processes[1:]:
            process.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        output = ""
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    for line in output.splitlines():
        if line.startswith(rank_checks.MARK):
            return [CheckResult(**values) for values in json.loads(line.removeprefix(rank_checks.MARK))]
    log.seek(0)  # type: ignore[attr-defined]
    lines = [line for line in log.read().splitlines() if line.strip()]  # type: ignore[attr-defined]
    detail = f"two ranks did not finish: {lines[-1] if lines else 'they printed nothing'}"
    return [
        CheckResult(
            "ranks", "start", FAIL, detail, f"without these ranks {', '.join(groups)} cannot be checked"
        )
    ]
