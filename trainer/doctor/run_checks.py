"""Run the checks on this machine, or on every machine of a launched job, and print a report."""

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
    "cpu": lambda settings: [machine.cpu_cores()],
    "gpu": lambda settings: [machine.accelerators()],
}
GROUPS = (*_MACHINE_CHECKS, *rank_checks.GROUPS)


def run_checks(settings: DoctorSettings) -> list[CheckResult]:
    """Return the results of all checks except the groups in `settings.skip`. Raises UserError for an unknown group.

    In a job of one rank, two ranks are started for the checks that need several ranks. In a job of several ranks, the call
    is collective, and all ranks return the same results.
    """
    for group in settings.skip:
        if group not in GROUPS:
            raise UserError(
                f"skip: there is no group {group!r}; known: {', '.join(GROUPS)}{did_you_mean(group, GROUPS)}"
            )
    rank_groups = [group for group in rank_checks.GROUPS if group not in settings.skip]
    environment = distributed.environment_from_launcher(os.environ)
    if environment.world_size == 1:
        return [*_check_machine(settings), *(_start_ranks(rank_groups) if rank_groups else [])]
    distributed.initialize(timeout_seconds=_RANKS_TIMEOUT_SECONDS)
    own = _check_machine(settings) if environment.local_rank == 0 else []
    host = socket.gethostname()
    by_rank = distributed.gather_objects([replace(result, host=host) for result in own])
    results = [result for rank_results in by_rank for result in rank_results]
    num_machines = sum(bool(rank_results) for rank_results in by_rank)
    if num_machines > 1:
        results = _merge(results, num_machines)
    return [*results, *rank_checks.check_ranks(rank_groups)]


def print_report(results: list[CheckResult], seconds: float, as_json: bool) -> bool:
    """Print the results on rank 0, as text or JSON. Return True if no check failed."""
    failed = sum(result.status == FAIL for result in results)
    warned = sum(result.status == WARN for result in results)
    if as_json:
        report = {"ok": not failed, "seconds": seconds, "findings": [asdict(result) for result in results]}
        terminal.info(json.dumps(report, indent=1))
        return not failed
    for result in results:
        host = f" [{result.host}]" if result.host else ""
        terminal.info(f"{result.status:<4}  {result.group}: {result.name}{host}: {result.detail}")
        if result.remedy:
            terminal.info(f"      -> {result.remedy}")
    terminal.info(f"{len(results)} checks in {seconds:.0f} s: {failed} failed, {warned} warning(s)")
    return not failed


def _check_machine(settings: DoctorSettings) -> list[CheckResult]:
    checks = [check for group, check in _MACHINE_CHECKS.items() if group not in settings.skip]
    return [result for check in checks for result in check(settings)]


def _merge(results: list[CheckResult], num_machines: int) -> list[CheckResult]:
    """Merge equal results of machines. `host` of a merged result lists these machines; "" if all machines have status OK."""
    groups: dict[tuple[str, str, str], list[CheckResult]] = {}
    for result in results:
        text = OK if result.status == OK else result.detail
        groups.setdefault((result.group, result.name, text), []).append(result)
    merged = []
    for equal_results in groups.values():
        is_ok_everywhere = len(equal_results) == num_machines and equal_results[0].status == OK
        hosts = "" if is_ok_everywhere else ", ".join(dict.fromkeys(result.host for result in equal_results))
        merged.append(replace(equal_results[0], host=hosts))
    return merged


def _start_ranks(groups: list[str]) -> list[CheckResult]:
    common = distributed.without_launcher_variables(os.environ)
    common |= {"WORLD_SIZE": str(_NUM_RANKS), "LOCAL_WORLD_SIZE": str(_NUM_RANKS)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(process_group.free_port())}
    command = [sys.executable, "-m", "trainer.doctor.rank_checks", *groups]
    processes = []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        for rank in range(_NUM_RANKS):
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            stdout = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            processes.append(subprocess.Popen(command, env=env, stdout=stdout, stderr=log, text=True))
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
            return [CheckResult(**result) for result in results]
    detail = f"two ranks did not finish: {lines[-1] if lines else 'they printed nothing'}"
    remedy = f"without these ranks {', '.join(groups)} cannot be checked"
    return [CheckResult("ranks", "start", FAIL, detail, remedy)]
