"""Run the checks on this machine, or on every machine of a launched job, and print a report."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace

from trainer.doctor import machine, rank_checks, software
from trainer.doctor.check_result import FAIL, OK, WARN, CheckResult
from trainer.errors import UserError
from trainer.runtime import distributed, process_group, terminal
from trainer.settings import DoctorSettings
from trainer.storage.configuration import did_you_mean

_NUM_RANKS = 2
_RANKS_TIMEOUT_SECONDS = 600
_MACHINE_CHECKS: dict[str, Callable[[DoctorSettings], list[CheckResult]]] = {
    "versions": lambda settings: software.versions(settings.known_good),
    "compiler": lambda settings: [software.compiler(), *software.unfinished_builds()],
    "mpi": lambda settings: [software.mpi()],
    "slurm": lambda settings: software.slurm(),
    "disk": lambda settings: machine.disk(settings.output_dir, settings.min_free_gb),
    "memory": lambda settings: [machine.shared_memory()],
    "cpu": lambda settings: [machine.processor()],
    "gpu": lambda settings: [machine.accelerators()],
}
GROUPS = (*_MACHINE_CHECKS, *rank_checks.GROUPS)


def run_checks(settings: DoctorSettings) -> list[CheckResult]:
    """Return all results. Without a launcher, two ranks are started here for the checks that need several.

    Collective under a launcher, with equal results on all ranks. Raises UserError for an unknown group.
    """
    for group in settings.skip:
        if group not in GROUPS:
            raise UserError(
                f"skip: there is no group {group!r}; known: {', '.join(GROUPS)}{did_you_mean(group, GROUPS)}"
            )
    wanted = [group for group in rank_checks.GROUPS if group not in settings.skip]
    environment = distributed.environment_from_launcher(os.environ)
    if environment.world_size == 1:
        return [*_check_machine(settings), *(_start_ranks(wanted) if wanted else [])]
    distributed.initialize(timeout_seconds=_RANKS_TIMEOUT_SECONDS)
    own = _check_machine(settings) if environment.local_rank == 0 else []
    host = socket.gethostname()
    by_rank = distributed.gather_objects([replace(result, host=host) for result in own])
    found = [result for results in by_rank for result in results]
    num_machines = sum(bool(results) for results in by_rank)
    if num_machines > 1:
        found = _merge(found, num_machines)
    return [*found, *rank_checks.check_ranks(wanted)]


def print_report(results: list[CheckResult], seconds: float, as_json: bool) -> bool:
    """Print one line per result (rank 0); return whether no check failed."""
    failed = sum(result.status == FAIL for result in results)
    warned = sum(result.status == WARN for result in results)
    if as_json:
        findings = [asdict(result) for result in results]
        report = {"ok": not failed, "seconds": seconds, "findings": findings}
        terminal.info(json.dumps(report, indent=1))
        return not failed
    for result in results:
        where = f" [{result.host}]" if result.host else ""
        terminal.info(f"{result.status:<4}  {result.group}: {result.name}{where}: {result.detail}")
        if result.remedy:
            terminal.info(f"      -> {result.remedy}")
    terminal.info(f"{len(results)} checks in {seconds:.0f} s: {failed} failed, {warned} warning(s)")
    return not failed


def _check_machine(settings: DoctorSettings) -> list[CheckResult]:
    checks = [check for group, check in _MACHINE_CHECKS.items() if group not in settings.skip]
    return [result for check in checks for result in check(settings)]


def _merge(results: list[CheckResult], num_machines: int) -> list[CheckResult]:
    """Join equal results of several machines; `host` lists the machines, and is empty if all are ok."""
    merged: dict[tuple[str, str, str], list[CheckResult]] = {}
    for result in results:
        text = OK if result.status == OK else result.detail
        merged.setdefault((result.group, result.name, text), []).append(result)
    found = []
    for same in merged.values():
        is_ok_everywhere = len(same) == num_machines and same[0].status == OK
        hosts = "" if is_ok_everywhere else ", ".join(dict.fromkeys(result.host for result in same))
        found.append(replace(same[0], host=hosts))
    return found


def _start_ranks(groups: list[str]) -> list[CheckResult]:
    """Run the checks of `groups` in two ranks started on this machine."""
    common = {"WORLD_SIZE": str(_NUM_RANKS), "LOCAL_WORLD_SIZE": str(_NUM_RANKS)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(process_group.free_port())}
    common = {**distributed.without_launcher_variables(os.environ), **common}
    processes = []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        for rank in range(_NUM_RANKS):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "trainer.doctor.rank_checks", *groups],
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=log,
                    text=True,
                )
            )
        deadline = time.monotonic() + _RANKS_TIMEOUT_SECONDS
        try:
            output, _ = processes[0].communicate(timeout=_RANKS_TIMEOUT_SECONDS)
            for process in processes[1:]:
                process.wait(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            output = ""
        finally:
            for process in processes:
                process.kill()
                process.wait()
        log.seek(0)
        lines = [line for line in log.read().splitlines() if line.strip()]
    for line in output.splitlines():
        if line.startswith(rank_checks.RESULTS_PREFIX):
            results = json.loads(line.removeprefix(rank_checks.RESULTS_PREFIX))
            return [CheckResult(**values) for values in results]
    detail = f"two ranks did not finish: {lines[-1] if lines else 'they printed nothing'}"
    remedy = f"without these ranks {', '.join(groups)} cannot be checked"
    return [CheckResult("ranks", "start", FAIL, detail, remedy)]
