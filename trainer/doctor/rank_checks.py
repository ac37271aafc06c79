"""Checks that need several ranks: clocks, network, gradient parity. Run alone: python -m trainer.doctor.rank_checks GROUP..."""

from __future__ import annotations

import json
import socket
import statistics
import sys
import time

from trainer.doctor.check_result import FAIL, OK, WARN, CheckResult
from trainer.runtime import distributed, terminal

GROUPS = ("clock", "network", "parity")
MARK = "doctor-findings: "
_SKEW_SECONDS = 1.0
_ROUNDS = 20
_SMALL, _LARGE = 1, 8 * 2**20  # fp32 numbers
_SLOW_LATENCY, _SLOW_BANDWIDTH = 5e-3, 50e6  # seconds; bytes/s


def check_ranks(groups: list[str]) -> list[CheckResult]:
    """Collective, after `distributed.initialize`; the same findings on every rank."""
    found: list[CheckResult] = []
    if "clock" in groups:
        found.append(clocks())
    if "network" in groups:
        found.append(network())
    if "parity" in groups:
        from trainer.doctor import gradient_parity

        found += gradient_parity.check_gradients()
    return found


def clocks() -> CheckResult:
    """Difference of the ranks' clocks at a barrier; a log and a time limit are read with them."""
    distributed.barrier()
    times = distributed.gather_objects((time.time(), socket.gethostname()))
    early, late = min(times), max(times)
    skew = late[0] - early[0]
    hosts = len({host for _, host in times})
    detail = f"{skew * 1000:.1f} ms between {len(times)} ranks on {hosts} machine(s)"
    if skew <= _SKEW_SECONDS:
        return CheckResult("clock", "skew", OK, detail)
    remedy = "synchronise the clocks (chrony); time limits and logs are read with them"
    return CheckResult("clock", "skew", WARN, f"{detail}: {late[1]} is ahead of {early[1]}", remedy)


def network() -> CheckResult:
    """Time of small all-reduces, and bytes/s of large ones, with the backend that trains."""
    import torch
    import torch.distributed as dist

    world = distributed.environment()
    if world.world_size == 1:
        return CheckResult("network", "all-reduce", OK, "one rank: nothing is sent")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = {}
    for elements in (_SMALL, _LARGE):
        # Every rank adds its number + 1; the sum tells whether what arrived is right.
        took = []
        for _ in range(_ROUNDS if elements == _SMALL else 3):
            numbers = torch.full((elements,), float(world.rank + 1), device=device)
            distributed.barrier()
            start = time.perf_counter()
            dist.all_reduce(numbers)
            wrong = float((numbers - world.world_size * (world.world_size + 1) / 2).abs().max())
            took.append(time.perf_counter() - start)
            if any(distributed.gather_objects(wrong)):
                remedy = "the network or its library corrupts data: do not train here"
                return CheckResult(
                    "network", "all-reduce", FAIL, f"a sum over {world.world_size} ranks is wrong", remedy
                )
        seconds[elements] = max(distributed.gather_objects(statistics.median(took)))
    # A ring sends every byte 2 (W-1)/W times.
    moved = 4 * _LARGE * 2 * (world.world_size - 1) / world.world_size
    bandwidth = moved / seconds[_LARGE]
    detail = f"{seconds[_SMALL] * 1e6:,.0f} us, {bandwidth / 1e6:,.0f} MB/s a rank, {world.world_size} ranks ({device})"
    if seconds[_SMALL] > _SLOW_LATENCY or bandwidth < _SLOW_BANDWIDTH:
        remedy = "slow: is it the right interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), are the cores overloaded?"
        return CheckResult("network", "all-reduce", WARN, detail, remedy)
    return CheckResult("network", "all-reduce", OK, detail)


def main(groups: list[str]) -> None:
    """One of the ranks that examine.py starts; rank 0 prints the findings as one line of JSON."""
    distributed.initialize(timeout_seconds=120)
    found = check_ranks(groups)
    if distributed.is_main_process():
        print(MARK + json.dumps([finding.as_dict() for finding in found]), flush=True)
    distributed.barrier()


if __name__ == "__main__":
    terminal.run(lambda: main(sys.argv[1:]))
